"""The resources of a process over time."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.processes import memory, open_files, thread_ids


@dataclass(frozen=True)
class Sample:
    """The resources at one moment.

    Attributes:
        seconds: Since the first sample.
        rss: Resident bytes.
        anonymous: Resident bytes that are not pages of files.
        threads: Their number.
        files: Number of open files.
    """

    seconds: float
    rss: int
    anonymous: int
    threads: int
    files: int


def sample(pid: int, begun: float) -> Sample:
    return Sample(
        seconds=round(time.monotonic() - begun, 1),
        rss=memory(pid, "VmRSS"),
        anonymous=memory(pid, "RssAnon"),
        threads=len(thread_ids(pid)),
        files=open_files(pid),
    )


@contextmanager
def sampled(pid: int, every: float) -> Iterator[list[Sample]]:
    """Takes samples of a process while the block runs."""
    samples, ended, begun = [sample(pid, time.monotonic())], threading.Event(), time.monotonic()

    def take() -> None:
        while not ended.wait(every):
            samples.append(sample(pid, begun))

    taking = threading.Thread(target=take)
    taking.start()
    try:
        yield samples
    finally:
        ended.set()
        taking.join()


def mean(samples: Sequence[Sample], of: Callable[[Sample], float], begin: float) -> float:
    """Returns the mean over a tenth of the samples, which begins at the fraction `begin`."""
    first = int(begin * len(samples))
    values = [of(each) for each in samples[first : first + max(1, len(samples) // 10)]]
    return sum(values) / len(values)


def write(samples: Sequence[Sample], path: Path) -> None:
    path.write_text("\n".join(json.dumps(asdict(each)) for each in samples))


def table(samples: Sequence[Sample]) -> str:
    """Formats the means of the tenths as a table."""
    lines = ["       s    RSS MB   anon MB   threads   files"]
    for tenth in range(10):
        begin = tenth / 10
        lines.append(
            f"{mean(samples, lambda s: s.seconds, begin):8.0f}"
            f"{mean(samples, lambda s: s.rss, begin) / 1e6:10.1f}"
            f"{mean(samples, lambda s: s.anonymous, begin) / 1e6:10.1f}"
            f"{mean(samples, lambda s: s.threads, begin):10.1f}"
            f"{mean(samples, lambda s: s.files, begin):8.1f}"
        )
    return "\n".join(lines)
