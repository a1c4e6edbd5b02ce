"""The parser of the command: a wrong option is one line."""

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Ends with one line and exit status 2 where argparse would print its usage first."""

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Writes the help that is printed, so that a full disk is an error, and exits."""
        print(end="", flush=True)
        super().exit(status, message)

    def error(self, message: str) -> NoReturn:
        """Prints the line and exits."""
        line = " ".join(message.split())
        self.exit(2, f"secateur: error: {line} (try {self.prog} --help)\n")
