"""Runs the command: `python -m secateur.cli`."""

from secateur.cli.command import run

run()
