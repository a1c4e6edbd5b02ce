"""Callers in this process, each of which makes one call after another on its own checkpoints."""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import secateur
from tests.soak import checked
from tests.soak.models import Case

MOST_KEPT = 4


@dataclass(eq=False)
class Caller:
    """One caller.

    Attributes:
        client: Its client.
        cases: The models that it prunes.
        expected: Errors with which any call may end.
        after_delete: Further errors with which a delete may end.
        scratch: A file for downloads.
        draws: Its random numbers.
        kept: The checkpoints that exist, and their cases.
        lost: Names of checkpoints that it has deleted, or tried to.
        counts: The outcomes of its calls.
        wrong: Unexpected errors.
        longest: The longest call, in seconds.
    """

    client: secateur.Client
    cases: Sequence[Case]
    expected: tuple[type[secateur.SecateurError], ...]
    after_delete: tuple[type[secateur.SecateurError], ...]
    scratch: Path
    draws: random.Random
    kept: dict[secateur.Checkpoint, Case] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[BaseException] = field(default_factory=list)
    longest: float = 0.0

    def work(self, is_over: Callable[[], bool]) -> None:
        with self.client:
            while not is_over() and not self.wrong:
                self._step()

    def _step(self) -> None:
        name, call = self._choose()
        begun = time.monotonic()
        try:
            call()
        except Exception as error:
            self.counts[f"{name}: {type(error).__name__}"] += 1
            may_be = self.after_delete if name == "delete" else ()
            if not isinstance(error, (*self.expected, *may_be)):
                error.add_note(f"in {name}, after {time.monotonic() - begun:.1f} s")
                self.wrong.append(error)
        else:
            self.counts[f"{name}: ok"] += 1
        self.longest = max(self.longest, time.monotonic() - begun)

    def _choose(self) -> tuple[str, Callable[[], None]]:
        case = self.draws.choice(self.cases)
        calls: dict[str, Callable[[], None]] = {
            "prune": lambda: checked.prune(self.client, case, self.draws),
            "report": lambda: checked.report(self.client, case),
            "upload": lambda: self._upload(case),
        }
        if self.kept:
            calls |= self._of_checkpoint(*self.draws.choice(list(self.kept.items())))
        if len(self.kept) < MOST_KEPT:
            calls.pop("delete", None)
        else:
            calls.pop("upload")
        name = self.draws.choice(list(calls))
        return name, calls[name]

    def _of_checkpoint(
        self, checkpoint: secateur.Checkpoint, case: Case
    ) -> dict[str, Callable[[], None]]:
        client, draws = self.client, self.draws
        return {
            "prune by handle": lambda: _none(checked.prune_handle(client, checkpoint, case, draws)),
            "report by handle": lambda: checked.report_handle(
                client, checkpoint, case.folded, case
            ),
            "delete": lambda: self._delete(checkpoint),
        }

    def _upload(self, case: Case) -> None:
        source = self.draws.choice([case.source, case.path])
        self.kept[self.client.upload(source, False)] = case

    def _delete(self, checkpoint: secateur.Checkpoint) -> None:
        del self.kept[checkpoint]
        self.lost.add(checkpoint.name)
        self.client.delete(checkpoint)


def _none(value: object) -> None:
    """Makes a lambda that returns nothing."""


@contextmanager
def at_work(callers: Sequence[Caller]) -> Iterator[None]:
    """Lets callers work while the block runs, and then waits for their last calls."""
    over = threading.Event()
    threads = [
        threading.Thread(target=caller.work, args=(over.is_set,), daemon=True) for caller in callers
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join(300)
    assert not any(thread.is_alive() for thread in threads), "a call hangs"


def check_right(callers: Sequence[Caller]) -> Counter[str]:
    """Checks that no answer was wrong and no error unexpected. Returns all outcomes."""
    for caller in callers:
        for error in caller.wrong:
            raise error
    return sum((caller.counts for caller in callers), Counter())


def check_kept(client: secateur.Client, caller: Caller) -> None:
    """Checks that every checkpoint of a caller exists and is complete.

    Args:
        client: Of the same owner.
        caller: The caller.
    """
    listed = {checkpoint.name for checkpoint in client.checkpoints()}
    for checkpoint, case in caller.kept.items():
        assert checkpoint.name in listed
        checked.download(client, checkpoint, case.folded, case, "dense", caller.scratch)
