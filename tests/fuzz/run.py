"""Runs atheris on one target: python -m tests.fuzz.run TARGET CORPUS [LIBFUZZER_OPTION]..."""

import sys
from pathlib import Path

import atheris

import secateur_server.backends.batches  # noqa: F401 (numba cannot compile instrumented code)

# Instrumented code reports its coverage to the fuzzer.
with atheris.instrument_imports(include=["secateur_proto", "secateur_server"]):
    from tests.fuzz.targets import TARGETS

from tests.fuzz.seeds import SEEDS, WORDS


def write_seeds(target: str, folder: Path) -> None:
    """Writes the valid inputs of a target to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(SEEDS[target]()):
        (folder / f"seed{number}").write_bytes(seed)


def write_words(path: Path) -> None:
    """Writes a dictionary in the format of libFuzzer."""
    quoted = (word.replace('"', '\\"') for word in WORDS)
    path.write_text("".join(f'"{word}"\n' for word in quoted))


def run(target: str, corpus: str, *options: str) -> None:
    """Fuzzes until a limit in the options is reached."""
    folder = Path(corpus)
    write_seeds(target, folder)
    words = folder.with_suffix(".dict")
    write_words(words)
    atheris.Setup([sys.argv[0], corpus, f"-dict={words}", *options], TARGETS[target])
    atheris.Fuzz()


if __name__ == "__main__":
    run(*sys.argv[1:])
