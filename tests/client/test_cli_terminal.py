"""What a person sees: tables that fit the terminal, colours, help and completion."""

import io
import json
import os
import pty
import re
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from shutil import which

import click
import numpy as np
import pytest
from rich.cells import cell_len
from safetensors.numpy import save_file

import secateur
from secateur import cli
from secateur.cli.command import COMMANDS, group
from secateur.cli.terminal import print_table
from secateur.tables import Table
from tests.client.test_cli import WEIGHTS
from tests.conftest import RunningServer

ESCAPE = re.compile(r"\x1b\[[0-9;]*m")
NAMES = [f"encoder.layer.{i}.attention.self.query.weight" for i in range(50)]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A terminal of 80 columns with colours."""
    for name, value in {"COLUMNS": "80", "LINES": "24", "TERM": "xterm-256color"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    return monkeypatch


def printed(table: Table, is_whole: bool = False) -> str:
    stream = Terminal()
    print_table(table, stream, is_whole)
    return stream.getvalue()


def report_table(client: secateur.Client) -> Table:
    weights = {name: np.ones((8, 8), np.float32) for name in NAMES}
    half = secateur.l1_unstructured("*", 0.5)
    return client.prune(weights, half, "none").report.table()


@pytest.mark.parametrize("columns", [30, 50, 80, 100, 200])
def test_tables_fit(terminal: pytest.MonkeyPatch, client: secateur.Client, columns: int) -> None:
    terminal.setenv("COLUMNS", str(columns))
    shown = ESCAPE.sub("", printed(report_table(client)))
    assert all(cell_len(line) <= columns for line in shown.splitlines())
    head, *lines = shown.splitlines()
    assert head.split()[0] == "tensor"
    assert "sparsity" in head
    assert ("zero slices" in head) == ("too narrow for" not in shown) == (columns == 200)
    rows = [line for line in lines if "weight  " in line]
    for name, row in zip(NAMES, rows, strict=False):
        assert name.endswith(row.split()[0].removeprefix("…"))
    assert all("50.00%" in row for row in rows)
    assert any(line.startswith("total  ") and "50.00%" in line for line in lines)
    assert f"{50 - len(rows)} more rows: --all shows them" in shown
    assert 10 <= len(rows) < 24


def test_all_rows_are_shown_on_demand(
    terminal: pytest.MonkeyPatch, client: secateur.Client
) -> None:
    shown = printed(report_table(client), is_whole=True)
    assert shown.count("query.weight") == 50
    assert "--all" not in shown


def test_colours_and_bars(terminal: pytest.MonkeyPatch) -> None:
    rows = [("tensor", "sparsity", "0.5"), ("a", "25.00%", "1.00%"), ("b", "100.00%", "90.00%")]
    rows.append(("c", "-", "-"))
    table = Table(rows, below=("warning: b",))
    shown = printed(table)
    assert "\x1b[32m" in shown  # green for a small loss, red for a large one
    assert "\x1b[31m" in shown
    assert "\x1b[33mwarning: b" in shown
    for name, value in {"NO_COLOR": "1", "TERM": "dumb"}.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(name, value)
            plain = printed(table)
        assert plain == ESCAPE.sub("", plain)
        assert "25.00%  ━━" in plain


def test_names_do_not_control_the_terminal(terminal: pytest.MonkeyPatch) -> None:
    table = Table([("tensor", "zeros"), ("a\x1b[2Jb\r", "1")], above=("x\x1b]0;y\x07",))
    assert "\x1b[2J" not in printed(table)
    assert "\x1b]" not in printed(table)
    assert "\r" not in printed(table)
    assert "[red]x[/red]" in printed(Table([("tensor", "zeros"), ("[red]x[/red]", "1")]))


@pytest.fixture
def model(tmp_path: Path, server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECATEUR_SERVER", server.address)
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def on_terminal(*arguments: str, **environment: str) -> tuple[int, str]:
    """Runs a program whose every stream is one terminal of 70 columns."""
    shell, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 70))
    known = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        arguments,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env={**known, "TERM": "xterm", **environment},
    )
    os.close(terminal)
    parts = b"".join(read_all(shell))
    os.close(shell)
    return process.wait(), parts.decode()


def read_all(shell: int) -> Iterator[bytes]:
    while True:
        try:
            part = os.read(shell, 1 << 16)
        except OSError:  # the last process has closed the terminal
            return
        if not part:
            return
        yield part


COMMAND = str(Path(sys.executable).with_name("secateur"))


def test_a_real_terminal(model: Path) -> None:
    status, shown = on_terminal(COMMAND, "report", model.name)
    assert status == 0
    assert "\x1b[1mtensor" in shown
    assert "too narrow for" in shown
    status, shown = on_terminal(COMMAND, "report", "none.safetensors", NO_COLOR="1")
    assert (status, shown) == (1, "secateur: none.safetensors: No such file or directory\r\n")
    status, shown = on_terminal(COMMAND, "report", "none.safetensors")
    assert (status, shown.startswith("\x1b[31msecateur:\x1b[0m none")) == (1, True)


# Every command -----------------------------------------------------------------------------------


def leaves(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    if not isinstance(command, click.Group):
        yield path
        return
    with click.Context(command) as context:
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield from leaves(found, (*path, name))


PATHS = list(leaves(group, ()))


@pytest.mark.parametrize("path", PATHS, ids=" ".join)
def test_help(path: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*path, "--help"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(f"Usage: secateur {' '.join(path)} ")
    if path != ("spec", "schema"):  # which is JSON anyway
        assert "--json" in shown.out
        assert "--quiet" in shown.out
    assert shown.err == ""
    for line in shown.out.splitlines():
        assert len(line) <= 80
        option = re.match(r"  (-\S.*?)(  |$)", line)
        assert option is None or len(option[1]) > 25 or line[2 + len(option[1]) :].strip(), line


def test_the_group_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"^  {name} +\w", shown, re.MULTILINE) for name in COMMANDS)
    assert "Exit status: 0" in shown
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"secateur {secateur.__version__}\n"


def test_json_of_commands(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of export, shrink and doctor are in the tests of these commands."""

    def answer(*arguments: str) -> object:
        assert cli.main([*arguments, "--json"]) == 0
        shown = capsys.readouterr()
        assert shown.err == ""
        return json.loads(shown.out)

    half = ["--method", "l1_unstructured", "--amount", "0.5"]
    save_file({"w": np.zeros((100, 100), np.float32)}, "zeros.safetensors")
    sizes = answer("pack", "zeros.safetensors", "-o", "p.safetensors")
    size = Path("p.safetensors").stat().st_size
    assert sizes == {"out": "p.safetensors", "bytes": size, "dense_bytes": 40_000}
    put = answer("checkpoints", "put", model.name)
    assert isinstance(put, dict)
    listed = answer("checkpoints", "ls")
    assert isinstance(listed, list)
    assert put in listed
    got = answer("checkpoints", "get", put["name"], "-o", "got.safetensors")
    assert got == {"name": put["name"], "out": "got.safetensors"}
    assert answer("checkpoints", "rm", put["name"]) == {"deleted": [put["name"]]}
    final = answer("finalize", model.name, "-o", "f.safetensors")
    pruned = answer("prune", model.name, "-o", "o.safetensors", *half)
    assert isinstance(final, dict)
    assert isinstance(pruned, dict)
    assert [warning["code"] for warning in pruned["warnings"]] == ["NOT_SMALLER"]
    again = answer("finalize", "o.safetensors", "-o", "f.safetensors")
    assert isinstance(again, dict)
    (note,) = again["warnings"]
    assert "`secateur pack f.safetensors -o f-small.safetensors`" in note["message"]


def test_a_packed_file_that_is_not_smaller_is_a_warning(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["pack", model.name, "-o", "p.safetensors"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("p.safetensors: ")
    (line,) = shown.err.splitlines()
    assert line.startswith("secateur: warning: p.safetensors is not smaller than the dense 164 ")
    assert "secateur prune IN -o OUT --method global_unstructured" in line


# Completion --------------------------------------------------------------------------------------

COMPLETIONS = [
    ("secateur se", "secateur sensitivity "),
    ("secateur checkpoints g", "secateur checkpoints get "),
    ("secateur prune --sta", "secateur prune --statistics "),
    ("secateur prune --method global_u", "secateur prune --method global_unstructured "),
    ("secateur report mod", "secateur report model.safetensors"),
]


def test_bash_completes(model: Path) -> None:
    source = b'eval "$(_SECATEUR_COMPLETE=bash_source secateur)"\n'
    check_completion(["bash", "--norc", "--noprofile", "-i"], source)


@pytest.mark.slow
@pytest.mark.skipif(not which("zsh"), reason="no zsh: make system")
def test_zsh_completes(model: Path) -> None:
    source = b"autoload -Uz compinit; compinit -u -D; bindkey -e; "
    source += b'eval "$(_SECATEUR_COMPLETE=zsh_source secateur)"\n'
    check_completion(["zsh", "-f", "-i"], source)


@pytest.mark.slow
@pytest.mark.skipif(not which("fish"), reason="no fish: make system")
@pytest.mark.parametrize(("line", "completed"), COMPLETIONS)
def test_fish_completes(model: Path, line: str, completed: str) -> None:
    code = f"_SECATEUR_COMPLETE=fish_source secateur | source; complete -C '{line}'"
    environment = {**os.environ, "HOME": str(model.parent), "PATH": on_path()}
    ended = subprocess.run(["fish", "-c", code], env=environment, capture_output=True, text=True)
    assert ended.stdout.split()[0] == completed.split()[-1]


def on_path() -> str:
    return f"{Path(COMMAND).parent}:{os.environ['PATH']}"


def prompted(shell: int) -> bytes:
    """What the shell prints until it waits for a line."""
    shown = b""
    while b"READY> " not in shown:
        shown += os.read(shell, 1 << 16)
    return shown


def check_completion(command: list[str], source: bytes) -> None:
    """Presses the tab key in a real shell, which then prints its line."""
    shell, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 200))
    environment = {**os.environ, "PATH": on_path(), "TERM": "dumb"}
    process = subprocess.Popen(
        command,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env={**environment, "PS1": "READY> "},
        start_new_session=True,
    )
    os.close(terminal)
    shown = prompted(shell)
    os.write(shell, source)
    for line, _ in COMPLETIONS:
        shown += prompted(shell)
        os.write(shell, f"{line}\t".encode())
        os.write(shell, b"\x01echo 'LINE: \x05'\n")  # quotes the line from its start to its end
    os.write(shell, b"exit\n")
    shown += b"".join(read_all(shell))
    os.close(shell)
    assert process.wait() == 0
    for _, completed in COMPLETIONS:
        assert f"\nLINE: {completed.rstrip()}" in shown.decode().replace("\r", "")
