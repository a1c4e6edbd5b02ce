"""The parser of the command; a usage error is one line."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

_HOW_TO_REPEAT = {
    "--tensors": "repeat the option for each: --tensors A --tensors B",
    "--amounts": "put commas between amounts: --amounts 0.5,0.7",
}


class Parser(argparse.ArgumentParser):
    """Prints one line for a usage error; argparse prints its usage before it."""

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Flushes standard output, so that a full disk is an error, and exits."""
        print(end="", flush=True)
        super().exit(status, message)

    def error(self, message: str) -> NoReturn:
        """Prints the line and exits with status 2."""
        line = " ".join(message.split())
        self.exit(2, f"secateur: error: {line} (try {self.prog} --help)\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuses an option of a command before the command's name."""
        given = sys.argv[1:] if args is None else list(args)
        if self._subparsers is not None and given and given[0].startswith("-"):
            self._check_first(given)
        return super().parse_known_args(given, namespace)

    def _check_first(self, given: Sequence[str]) -> None:
        option = given[0].partition("=")[0]
        if not any(known.startswith(option) for known in self._option_string_actions):
            (commands,) = (a for a in self._actions if isinstance(a, argparse._SubParsersAction))
            command = next((word for word in given if word in commands.choices), "COMMAND")
            self.exit(
                2,
                f"secateur: error: {option}: options come after the command, as in "
                f"{self.prog} {command} {option} (try {self.prog} {command} --help)\n",
            )


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses arguments; the command that they name reports the ones that it does not know.

    Args:
        parser: Each of its commands has a default `wrong_usage`, which is its own `error`.
        arguments: See argparse.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    options, left = parser.parse_known_args(given)
    if left:
        before = given[: given.index(left[0])]
        option = next((word for word in reversed(before) if word.startswith("-")), "").split("=")[0]
        hint = f"; {_HOW_TO_REPEAT[option]}" if option in _HOW_TO_REPEAT else ""
        options.wrong_usage(f"unrecognized arguments: {' '.join(left)}{hint}")
    return options
