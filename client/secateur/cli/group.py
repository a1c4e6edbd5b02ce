"""Groups of commands, which click runs, and hints for wrong usage."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import click

_HOW_TO_REPEAT = {
    "--tensors": "repeat the option for each: --tensors A --tensors B",
    "--amounts": "put commas between amounts: --amounts 0.5,0.7",
}


class Command(click.Command):
    """A command that explains how to give several values."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parses arguments; an error names the command, and how to repeat an option."""
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            hints = [h for o, h in _HOW_TO_REPEAT.items() if any(a.startswith(o) for a in given)]
            error.ctx = ctx
            if hints and "extra argument" in error.message:
                raise click.UsageError(f"{error.message}; {hints[0]}", ctx) from None
            raise


class Group(click.Group):
    """A group whose options come after the name of the command."""

    command_class = Command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parses arguments; an option before the command is an error that shows its place."""
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            known = self.list_commands(ctx)
            command = next((word for word in given if word in known), "COMMAND")
            path, option = ctx.command_path, error.option_name
            raise click.UsageError(
                f"{option}: options come after the command, as in {path} {command} {option}", ctx
            ) from None


class LazyGroup(Group):
    """A group whose commands are modules, which are imported when their command runs."""

    def __init__(self, *args: Any, helps: Mapping[str, str], **more: Any) -> None:
        """Makes a group.

        Args:
            args: See click.
            helps: One line on each command. secateur.cli.NAME has its `command`.
            more: See click.
        """
        super().__init__(*args, **more)
        self._helps = helps

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Returns the names of the commands, in their order."""
        return list(self._helps)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
        """Imports a command."""
        if cmd_name not in self._helps:
            known = ", ".join(self._helps)
            raise click.UsageError(f"no such command {cmd_name!r}; known are {known}", ctx)
        found: click.Command = import_module(f"secateur.cli.{cmd_name}").command
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the list of commands for --help."""
        with formatter.section("Commands"):
            formatter.write_dl(list(self._helps.items()))
