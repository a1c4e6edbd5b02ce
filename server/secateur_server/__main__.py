"""The command `secateur-server`."""

import ctypes
import gc
import logging
import os
import resource
import signal
import sys
from contextlib import suppress
from typing import NoReturn

# gRPC's own messages on stderr, such as failed handshakes of strangers, are not JSON. gRPC reads
# this variable once, when it is imported.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

# By default glibc creates up to eight heaps for each core, and each keeps memory of past messages.
# Two are set before a library starts threads, unless the operator has set another number.
M_ARENA_MAX = -8  # of malloc.h
if not {"MALLOC_ARENA_MAX", "GLIBC_TUNABLES"} & os.environ.keys():
    with suppress(AttributeError):  # another C library has no mallopt
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 2)

try:
    from prometheus_client import disable_created_metrics

    from secateur_server.app import App
    from secateur_server.check import check
    from secateur_server.config import read_config
    from secateur_server.operate.logs import set_up
    from secateur_server.options import unknown_variables
    from secateur_server.startup import CannotStart
except ImportError as error:  # installed without the extra [server]
    sys.exit(
        f"secateur-server: {error}; install the server's packages: pip install 'secateur[server]'"
    )

# The exit status if the server cannot answer calls any more: EX_SOFTWARE of sysexits.h.
DEAD_STATUS = 70


def main() -> int:
    """Serves until SIGTERM or SIGINT. Returns the exit status."""
    config = read_config(sys.argv[1:])
    if config.check:
        return check(config)
    set_up(config.log_format)
    # The `_created` series of counters and histograms are unused. This setting affects all
    # registries of the process, so an embedded server does not change it.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    log = logging.getLogger("secateur_server")
    for line in unknown_variables():
        log.warning("%s", line)
    # Each connection and each mapped shard is an open file. A shell often allows only 1024.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    stop_signals = _signals()
    try:
        app = App(config, died=_died)
    except CannotStart as error:
        print(f"secateur-server: {error}", file=sys.stderr)
        return 1
    log.info("serving gRPC at %s on %s", app.address, config.device)
    if app.metrics_address is not None:
        log.info("serving metrics at http://%s/metrics", app.metrics_address)
    gc.freeze()  # the modules are never freed, and scanning them takes tens of ms
    # By default Python searches for cycles after each 700 new objects. A request of many tensors
    # creates tens of thousands of objects without cycles.
    gc.set_threshold(10_000)
    os.read(stop_signals, 1)
    log.info("shutting down: running requests get %g seconds", config.drain_timeout)
    app.stop()
    log.info("stopped")
    return 0


def run() -> NoReturn:
    """Runs the process, and ends it at once when `main` has stopped the server.

    Threads of gRPC, torch and the metrics may still run while the interpreter shuts down, and have
    aborted the process then, so that a successful stop looked like a crash.
    """
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _died() -> None:
    """Ends the process at once: a drain would not help, since no call can be answered."""
    sys.stderr.flush()
    os._exit(DEAD_STATUS)


def _signals() -> int:
    """A descriptor from which a byte can be read after SIGTERM or SIGINT.

    The system may deliver a signal to any thread, but Python runs handlers in the main thread only,
    once it wakes up. So a handler that sets an Event might never run.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    return reading


if __name__ == "__main__":
    run()
