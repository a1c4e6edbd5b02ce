"""Evictions: the uploading tenant's own checkpoints first, and never others' fair share."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

import secateur
from tests.contract.raw import check_failed, failure, kept_open, series
from tests.storage.stored import (
    Kept,
    file_message,
    file_of,
    kept,
    model,
    send_upload,
    sending,
    upload_file,
    upload_requests,
)

KIB = 1024
LIMIT = 1232 * KIB


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Kept]:
    with kept(tmp_path / "store", "--store-max-bytes", str(LIMIT)) as running:
        yield running


class Tenant:
    """A tenant with its uploads, in their order."""

    def __init__(self, store: Kept, name: str) -> None:
        self.client = secateur.Client(store.server.address, token=name, timeout=300)
        self.made: list[secateur.Checkpoint] = []

    def upload(self, kib: int) -> None:
        """Uploads a new model of `kib` KiB. The header, sums and a record take 10 to 12 more."""
        self.made.append(self.client.upload(model(kib * KIB // 4, id(self) + len(self.made))))

    def kept(self) -> list[int]:
        """Returns which of its uploads the server still has."""
        names = {checkpoint.name for checkpoint in self.client.checkpoints()}
        return [index for index, made in enumerate(self.made) if made.name in names]


@pytest.fixture
def tenants(store: Kept) -> Iterator[list[Tenant]]:
    """Three tenants; the first one holds four models, 260 KiB each of 1232."""
    with ExitStack() as held:
        made = [Tenant(store, name) for name in ("alice", "bob", "carol")]
        for tenant in made:
            held.enter_context(tenant.client)
        for _ in range(4):
            made[0].upload(250)
        yield made


def evictions(store: Kept) -> float:
    return series(store.server, "secateur_evictions_total", reason="room")


def test_own_checkpoints_are_evicted_before_older_ones_of_others(tenants: list[Tenant]) -> None:
    alice, bob, _ = tenants
    bob.upload(80)
    bob.upload(60)
    bob.client.report(bob.made[0])
    bob.upload(80)  # evicts the 60, which are least recently used
    assert (alice.kept(), bob.kept()) == ([0, 1, 2, 3], [0, 2])


def test_checkpoints_above_other_tenants_share_are_evicted_next(tenants: list[Tenant]) -> None:
    alice, bob, _ = tenants
    alice.client.report(alice.made[0])
    bob.upload(100)
    bob.upload(200)  # after evicting its own 100, 192 are free
    assert (alice.kept(), bob.kept()) == ([0, 2, 3], [1])
    bob.upload(400)  # after evicting its own 200, 452 are free
    assert (alice.kept(), bob.kept()) == ([0, 2, 3], [2])


def test_eviction_leaves_each_tenant_its_share(store: Kept, tenants: list[Tenant]) -> None:
    """The limit is 1232 KiB: a share is 616 KiB for two tenants, 410 for three."""
    alice, bob, carol = tenants
    bob.upload(400)
    assert alice.kept() == [1, 2, 3]
    before = evictions(store)
    with pytest.raises(secateur.StoreFull, match="fair share"):
        carol.upload(400)  # 40 are free, and an eviction from alice would free 260
    assert (alice.kept(), bob.kept()) == ([1, 2, 3], [0])
    carol.upload(20)
    carol.upload(250)  # alice keeps 520 of 780; bob would lose his only 412
    assert (alice.kept(), bob.kept(), carol.kept()) == ([2, 3], [0], [1])
    with pytest.raises(secateur.StoreFull, match="fair share"):
        carol.upload(300)  # alice would keep only 260
    assert (alice.kept(), bob.kept(), carol.kept()) == ([2, 3], [0], [1])
    assert evictions(store) == before + 2


def test_eviction_waits_for_the_bytes_that_need_it(store: Kept, tenants: list[Tenant]) -> None:
    alice, _, carol = tenants
    data, before = file_of(model(580 * KIB // 4)), evictions(store)
    with sending(store, data, 1000, "bob"):
        carol.upload(100)  # the announced bytes do not count yet
        assert (alice.kept(), carol.kept()) == ([0, 1, 2, 3], [0])
        assert evictions(store) == before
    with sending(store, data, 200 * KIB, "bob"):
        assert alice.kept() == [1, 2, 3]
        assert evictions(store) == before + 1


def test_upload_that_needs_other_tenants_share_is_refused_at_once(
    store: Kept, tenants: list[Tenant]
) -> None:
    alice, bob, _ = tenants
    before = evictions(store)
    message = file_message(b"", size_bytes=LIMIT - 10 * KIB, blake3="0" * 64)
    with kept_open(upload_requests([upload_file(message)])) as messages:
        found = failure(send_upload, store.channel, messages, "bob")
    check_failed(found, grpc.StatusCode.RESOURCE_EXHAUSTED, "STORE_FULL")
    assert (alice.kept(), evictions(store)) == ([0, 1, 2, 3], before)
    bob.upload(100)
