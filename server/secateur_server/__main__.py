"""The command secateur-server."""

import ctypes
import gc
import logging
import os
import resource
import signal
import sys
from contextlib import suppress
from typing import NoReturn

# What grpc writes to stderr itself, as of a stranger's failed handshake, is no JSON. It is read
# once, when grpc is imported.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

# By default glibc makes eight heaps for each core, of which each keeps room for the messages that
# once came by it. It is told before a library starts threads; an operator may want others.
M_ARENA_MAX = -8  # of malloc.h
if not {"MALLOC_ARENA_MAX", "GLIBC_TUNABLES"} & os.environ.keys():
    with suppress(AttributeError):  # another C library has no heaps to count
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 2)

try:
    from prometheus_client import disable_created_metrics

    from secateur_server.app import App, CannotStart
    from secateur_server.check import check
    from secateur_server.config import read_config, unknown_variables
    from secateur_server.operate.logs import set_up
except ImportError as error:  # installed as the client alone
    sys.exit(
        f"secateur-server: {error}; install the server's packages: pip install 'secateur[server]'"
    )

# The exit status if the server can answer no calls any more: EX_SOFTWARE of sysexits.h.
DEAD_STATUS = 70


def main() -> int:
    """Serves until SIGTERM or SIGINT. Returns the exit status."""
    config = read_config(sys.argv[1:])
    if config.check:
        return check(config)
    set_up(config.log_format)
    # Nobody reads the `_created` series of each counter and histogram. This is for all registries
    # of the process, so an embedded server does not do it.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    log = logging.getLogger("secateur_server")
    for line in unknown_variables():
        log.warning("%s", line)
    # A connection, and each mapped shard, is an open file; of those a shell often allows 1024.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    asked = _signals()
    try:
        app = App(config, died=_died)
    except CannotStart as error:
        print(f"secateur-server: {error}", file=sys.stderr)
        return 1
    log.info("serving gRPC at %s on %s", app.address, config.device)
    if app.metrics_address is not None:
        log.info("serving metrics at http://%s/metrics", app.metrics_address)
    gc.freeze()  # the modules stay: to look through them again and again takes tens of ms
    # By default Python looks for cycles after each 700 objects. A request of many tensors makes
    # tens of thousands, which are no cycles.
    gc.set_threshold(10_000)
    os.read(asked, 1)
    log.info("shutting down: running requests get %g seconds", config.drain_timeout)
    app.stop()
    log.info("stopped")
    return 0


def run() -> NoReturn:
    """The process: ends at once when `main` has stopped the server.

    Threads of gRPC, torch and the metrics may still be at work when the interpreter is taken down,
    and have been seen to abort the process then: it would have failed after it ended well.
    """
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _died() -> None:
    """Ends the process at once: there is no caller left whom a drain would serve."""
    sys.stderr.flush()
    os._exit(DEAD_STATUS)


def _signals() -> int:
    """The end of a pipe that has a byte once SIGTERM or SIGINT came.

    The system may give a signal to any thread. Python's handlers run in the main thread alone, and
    only once it wakes by itself: an Event that it waits for may never be set.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    return reading


if __name__ == "__main__":
    run()
