"""Progress of the work on files is their share of all bytes, and reaches its end."""

from dataclasses import dataclass

import pytest

from secateur_server.api.convert.checkpoint import progress_message
from secateur_server.api.shards.model import worked
from secateur_server.backends.protocol import Backend
from secateur_server.runtime.context import RequestContext
from tests.cluster.divided import InProcess


@dataclass(frozen=True)
class File:
    size: int


def measure(context: RequestContext, backend: Backend, file: File) -> int:
    return file.size


def test_progress_is_the_share_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    context, shares = RequestContext(), [0.0]
    advance = RequestContext.advance

    def seen(self: RequestContext, count: int) -> None:
        advance(self, count)
        shares.append(progress_message(self).share)

    monkeypatch.setattr(RequestContext, "advance", seen)
    files = [File(600), File(300), File(100)]  # the last one is done first
    for phase in ("fetch", "read", "read", "write"):
        assert worked(context, InProcess(), phase, measure, files) == [600, 300, 100]
    fetched, read, written = 0.4, 0.5, [0.55, 0.7, 1.0]
    expected = [0.04, 0.16, fetched, fetched, fetched, read, read, read, read, *written]
    assert shares == pytest.approx([0.0, *expected])
