"""What a server answers: health, versions, device, and how fast."""

import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np

from secateur.checkup.check import Check, Clock, failed
from secateur.client import Client
from secateur.diagnosis import Target, advice_on
from secateur.errors import PermissionDenied, SecateurError, Unauthenticated, from_rpc
from secateur.methods import l1_unstructured
from secateur.server_info import ServerInfo
from secateur.versions import VERSION

_SERVING = b"\x08\x01"  # grpc.health.v1.HealthCheckResponse with SERVING

# What measures the speed.
WEIGHTS, _CALLS = 1 << 20, 2
MODEL = {"w": np.random.default_rng(0).standard_normal((WEIGHTS >> 10, 1 << 10), np.float32)}
HALF = l1_unstructured("w", 0.5)
_BYTES = 4 * WEIGHTS
_SIZE = f"{_BYTES / 1e6:.1f} MB"
_SLOW_LINE, _SLOW_PRUNE = 5e6, 2.0  # bytes a second; seconds
_SEND_LESS = "upload models once: secateur checkpoints put; or name URIs that the server opens"


def check_service(
    channel: grpc.Channel, target: Target, token: str | None, clock: Clock
) -> Iterator[Check]:
    """Checks the server on a channel; nothing is left on it."""
    yield (health := _health(channel, target, clock))
    if health.status == "fail":
        return
    with Client(channel=channel, token=token, timeout=clock.step()) as client:
        try:
            info = client.server_info()
        except (Unauthenticated, PermissionDenied) as error:
            yield _refused(error)
            return
        except SecateurError as error:
            yield failed("server", str(error), "look into the server's log")
            return
    yield Check("token", "ok", "accepted" if token else "none given, and none needed")
    yield _version(info)
    yield Check("device", "ok", info.device or "unknown, as the server is older")
    yield from _speed(channel, token, clock)


def _health(channel: grpc.Channel, target: Target, clock: Clock) -> Check:
    """Asks for the health, which needs no token."""
    check: Any = channel.unary_unary("/grpc.health.v1.Health/Check")
    begin = time.monotonic()
    try:
        answer = check(b"", timeout=clock.step())
    except grpc.RpcError as error:
        said = str(from_rpc(error))
        advice = advice_on(target, clock.step(), said) or said
        return failed("grpc", advice, "look into the server's log")
    milliseconds = 1e3 * (time.monotonic() - begin)
    if answer != _SERVING:
        advice = "wait until it has started, or look into its log"
        return Check("grpc", "fail", "the server answers that it does not serve now", advice)
    return Check("grpc", "ok", f"the server is healthy, and answers in {milliseconds:.1f} ms")


def _refused(error: SecateurError) -> Check:
    """The check of a token that the server refuses; the server's message ends in advice."""
    said = str(error).removeprefix("authorization: ")
    found, *advice = re.split("[:;] ", said, maxsplit=1)
    return Check("token", "fail", found, *(advice or ["give --token, or set SECATEUR_TOKEN"]))


def _version(info: ServerInfo) -> Check:
    versions = [f"{name} {number}" for name, number in sorted(info.versions.items())]
    found = ", ".join([f"secateur {info.version}", "protocol secateur.v1", *versions])
    if info.version == VERSION:
        return Check("server", "ok", found)
    advice = f"install the same version on both: this client has {VERSION}"
    return Check("server", "warn", found, advice)


def _speed(channel: grpc.Channel, token: str | None, clock: Clock) -> Iterator[Check]:
    """The speed of the line, and of a prune of a million weights."""
    with Client(channel=channel, token=token, timeout=clock.step()) as client:
        try:
            sent = best_of(lambda: client.report(MODEL, progress=False))
            pruned = best_of(lambda: client.prune(MODEL, HALF, "none", False))
        except SecateurError as error:
            yield Check("line", "warn", f"{_SIZE} not pruned in time ({error})", _SEND_LESS)
            return
    speed = _BYTES / sent
    found = f"{_SIZE} sent and reported in {sent:.3f} s, {speed / 1e6:,.0f} MB/s"
    is_slow = speed < _SLOW_LINE
    yield Check("line", "warn", found, _SEND_LESS) if is_slow else Check("line", "ok", found)
    yield selection(pruned, sent)


def best_of(call: Callable[[], object]) -> float:
    """Returns the seconds of the fastest of some calls; the first one makes things ready."""
    found = []
    for _ in range(_CALLS):
        begin = time.monotonic()
        call()
        found.append(time.monotonic() - begin)
    return min(found)


def selection(pruned: float, sent: float) -> Check:
    """Returns the check of the seconds of a prune of `MODEL`.

    Args:
        pruned: Seconds of the prune.
        sent: The part of them that any call with the model takes.
    """
    seconds = max(0.0, pruned - sent)
    found = f"{WEIGHTS:,} weights pruned in {pruned:.3f} s, {seconds:.3f} s without the line"
    if seconds > _SLOW_PRUNE:
        return Check("selection", "warn", found, "the server is busy: run again, or see its load")
    return Check("selection", "ok", found)
