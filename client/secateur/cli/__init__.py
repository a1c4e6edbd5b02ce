"""The command secateur."""

from secateur.cli.command import main, run

__all__ = ["main", "run"]
