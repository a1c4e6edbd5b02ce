"""The command, as a user types it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.numpy import load_file, save_file

import secateur
from secateur import cli
from tests.conftest import RunningServer

WEIGHTS: dict[str, npt.NDArray[Any]] = {
    "conv.weight": np.arange(1, 25, dtype=np.float32).reshape(4, 1, 3, 2),
    "fc.weight": -np.arange(25, 37, dtype=np.float32).reshape(3, 4),
    "fc.bias": np.arange(1, 4, dtype=np.float32),
    "steps": np.array([7], np.int64),
}


@pytest.fixture
def model(tmp_path: Path, server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model's file; commands without --server go to the tests' server."""
    monkeypatch.setenv("SECATEUR_SERVER", server.address)
    path = tmp_path / "model.safetensors"
    save_file(WEIGHTS, path, metadata={"format": "pt"})
    return path


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def failure(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The error of a command that fails: one line, with exit status 1 and no half-written file."""
    out = Path(str(arguments[arguments.index("-o") + 1])) if "-o" in arguments else None
    before = set(out.parent.iterdir()) if out and out.parent.is_dir() else None
    assert run(*arguments) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("secateur: ")
    assert shown.err.count("\n") == 1
    if out and before is not None:
        assert set(out.parent.iterdir()) == before
    return shown.err


def test_prune_writes_zeros_and_prints_the_report(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = model.with_name("out.safetensors")
    assert run("prune", model, "-o", out, "--method", "l1_unstructured", "--amount", "0.5") == 0
    pruned = load_file(out)
    assert list(pruned) == list(load_file(model))
    large = WEIGHTS["conv.weight"] > 12
    assert (pruned["conv.weight"] == WEIGHTS["conv.weight"] * large).all()
    assert (pruned["fc.bias"] == WEIGHTS["fc.bias"]).all()  # one dimension: not pruned by default
    assert (pruned["steps"] == WEIGHTS["steps"]).all()
    assert "total" in capsys.readouterr().out
    assert b'"format":"pt"' in out.read_bytes()[:200]  # other libraries ask for it


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_torch_files_are_read_and_written(model: Path, suffix: str) -> None:
    source, out = model.with_name("in.pth"), model.with_name(f"out{suffix}")
    torch.save({name: torch.from_numpy(array) for name, array in WEIGHTS.items()}, source)
    assert run(*("prune", source, "-o", out, "--method", "identity", "--tensors", "fc.*")) == 0
    if suffix == ".safetensors":
        found = {name: torch.from_numpy(array) for name, array in load_file(out).items()}
    else:
        found = torch.load(out, weights_only=True)
    assert all(torch.equal(found[name], torch.from_numpy(WEIGHTS[name])) for name in WEIGHTS)


def test_reparametrize_then_finalize(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs, final = model.with_name("pairs.safetensors"), model.with_name("final.safetensors")
    arguments = ["--method", "ln_structured", "--amount", "1", "--n", "2", "--dim", "-1"]
    arguments += ["--tensors", "fc.weight", "--output", "reparametrized"]
    assert run("prune", model, "-o", pairs, *arguments) == 0
    assert "fc.weight_mask" in load_file(pairs)
    assert run("finalize", pairs, "-o", final) == 0
    assert load_file(final)["fc.weight"].tolist() == [
        [0, -26, -27, -28],
        [0, -30, -31, -32],
        [0, -34, -35, -36],
    ]
    capsys.readouterr()
    assert run("report", final, "--json", "--tensors", "fc.weight") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["zeros"], report["total"]) == (3, 12)
    assert report["tensors"]["fc.weight"]["zero_slices"] == [0, 1]


SPEC = {
    "rules": [
        {"method": "l1_unstructured", "tensors": "conv.*", "amount": 0.5},
        {"method": "ln_structured", "tensors": ["fc.weight"], "amount": 2, "n": "fro", "dim": 0},
    ]
}
SPEC_YAML = """
rules:
  - {method: l1_unstructured, tensors: "conv.*", amount: 0.5}
  - method: ln_structured
    tensors: [fc.weight]
    amount: 2
    n: fro
    dim: 0
"""


@pytest.mark.parametrize(
    ("name", "text"), [("s.json", json.dumps(SPEC)), ("s.yaml", SPEC_YAML), ("s.yml", SPEC_YAML)]
)
def test_a_spec_comes_from_a_file(model: Path, name: str, text: str) -> None:
    model.with_name(name).write_text(text)
    out = model.with_name("out.safetensors")
    assert run("prune", model, "-o", out, "--spec", model.with_name(name)) == 0
    found = load_file(out)
    assert (found["conv.weight"] == 0).sum() == 12
    assert (found["fc.weight"] == 0).all(1).tolist() == [True, True, False]


SHRUNK = {
    "rules": [
        {
            "method": "grouped",
            "groups": [
                {
                    "name": "rows",
                    "members": [{"tensor": "fc.weight"}, {"tensor": "fc.bias", "masked": False}],
                }
            ],
            "amount": 1,
            "align": 2,
        }
    ]
}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("is_embedded", [False, True])
def test_a_spec_shrinks_any_file(
    model: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, is_embedded: bool
) -> None:
    if is_embedded:
        monkeypatch.delenv("SECATEUR_SERVER")
    spec, source, out = (model.with_name(f"{n}{suffix}") for n in ("spec", "source", "out"))
    spec = spec.with_suffix(".json")
    spec.write_text(json.dumps(SHRUNK))
    if suffix == ".pt":
        torch.save({name: torch.from_numpy(array) for name, array in WEIGHTS.items()}, source)
    else:
        save_file(WEIGHTS, source)
    assert run("prune", source, "-o", out, "--spec", spec, "--output", "shrunk") == 0
    found = secateur.load(out)
    assert np.array_equal(found["fc.weight"], WEIGHTS["fc.weight"][1:])
    assert np.array_equal(found["fc.bias"], WEIGHTS["fc.bias"][1:])


@pytest.mark.parametrize(("amount", "is_noted"), [("10", True), ("3", False), ("10%", False)])
def test_a_count_that_may_be_meant_in_percent_is_noted(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], amount: str, is_noted: bool
) -> None:
    large = tmp_path / "large.safetensors"
    save_file({"w": np.arange(1, 1001, dtype=np.float32).reshape(10, 100)}, large)
    out = tmp_path / "out.safetensors"
    options = ["--method", "l1_unstructured", "--amount", amount]
    assert run("prune", large, "-o", out, *options) == 0
    note = "secateur: note: --amount 10 is a number of units; for a share of them give --amount 10%"
    assert (note in capsys.readouterr().err) is is_noted
    assert run("prune", large, "-o", out, *options, "--quiet") == 0
    assert capsys.readouterr().err == ""


def test_errors_are_one_line(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = model.with_name("out.safetensors")
    half = ["--method", "l1_unstructured", "--amount", "0.5"]

    def fails(*arguments: object) -> str:
        return failure(capsys, "prune", *arguments)

    missing = model.with_name("x.safetensors")
    for wrong_or_right in (out, model.with_name("o")):
        assert f"{missing}: No such file" in fails(missing, "-o", wrong_or_right, *half)
        for command in ("pack", "finalize"):
            said = failure(capsys, command, missing, "-o", wrong_or_right)
            assert f"{missing}: No such file" in said
    assert "nearest: 'fc.weight'" in fails(model, "-o", out, *half, "--tensors", "fc.wight")
    for name in ("o.zip", "o.h5", "o"):
        said = fails(model, "-o", model.with_name(name), *half)
        assert f"unknown suffix {Path(name).suffix!r}; known are .safetensors, .pt, .pth" in said
        assert "a folder (-o NAME) is made only for a model, not masks, read from a folder" in said
    assert "no such folder" in fails(model, "-o", model.parent / "x/o.pt", *half)
    assert "s.json" in fails(model, "-o", out, "--spec", model.with_name("s.json"))
    broken = model.with_name("broken.safetensors")
    broken.write_bytes(model.read_bytes()[:-1])
    assert "broken.safetensors" in fails(broken, "-o", out, *half)
    assert "127.0.0.1:1" in fails(model, "-o", out, *half, "--server", "127.0.0.1:1")


@pytest.mark.parametrize("text", ["{", "rules: [", "[]", "rules: []", "rules: [{method: x}]", "7"])
@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_a_broken_spec_is_one_line(
    model: Path, text: str, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = model.with_name(f"spec.{suffix}")
    spec.write_text(text)
    said = failure(capsys, "prune", model, "-o", model.with_name("out.pt"), "--spec", spec)
    assert str(spec) in said


PRUNE = ["prune", "m.pt", "-o", "o.pt"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "error: missing command (try secateur --help)"),
        (["checkpoints"], "missing command (try secateur checkpoints --help)"),
        (["prune", "m.pt"], "-o/--out or --keep is required"),
        (PRUNE, "--method or --spec is required"),
        (["prune", "m.pt", "--method", "identity"], "-o/--out or --keep is required"),
        ([*PRUNE, "--method", "magic"], "--method: 'magic' is not one of 'identity', "),
        ([*PRUNE, "--method", "identity", "--spec", "s.json"], "--spec: not allowed with"),
        ([*PRUNE, "--method", "lamp", "--amount", "half"], "'half' is not an amount, such as"),
        ([*PRUNE, "--method", "lamp", "--amount", "x%"], "'x%' is not an amount, such as"),
        *(
            ([*PRUNE, "--method", "lamp", "--amount", text], f"--amount: {text!r} is not an amount")
            for text in ("1.5", "150%", "-0.5", "-1", "nan", "inf", "1e9", str(1 << 64))
        ),
        (["plan", "m.pt", "--amounts", "0.5,1.5"], "--amounts: '1.5' is not an amount"),
        ([*PRUNE, "--method", "l1_unstructured"], "--method l1_unstructured needs --amount"),
        ([*PRUNE, "--method", "ln_structured", "--amount=1", "--dim=0"], "needs --n (try"),
        ([*PRUNE, "--method", "lamp", "--amount=1", "--dim=0"], "--method lamp takes no --dim"),
        ([*PRUNE, "--method", "lamp", "--dim=x"], "--dim: 'x' is not a valid integer"),
        ([*PRUNE, "--method", "ln_structured", "--n=x"], "--n: 'x' is not a number, inf"),
        ([*PRUNE, "--spec", "s.json", "--amount=1"], "--spec has the whole spec: leave out --am"),
        ([*PRUNE, "--method", "identity", "--json", "--quiet"], "--quiet: not allowed with"),
        ([*PRUNE, "--method", "identity", "--timeout", "0"], "'0' is not a number of seconds"),
        (["plan", "m.pt", "--method", "lamp", "--dim=0"], "takes no --dim (try secateur plan"),
        (["plan", "m.pt", "--amounts", "1,x"], "--amounts: 'x' is not an amount"),
        (["report"], "missing argument 'IN' (try secateur report --help)"),
        (["report", "m.pt", "--nope"], "no such option '--nope'. "),
        (["report", "m.pt", "--tensors", "a", "b"], "(b); repeat the option for each: --tensors A"),
        (["report", "m.pt", "--tensors=a", "b"], "(b); repeat the option for each: --tensors A"),
        (
            ["plan", "m.pt", "--amounts", "0.5", "0.7"],
            "(0.7); put commas between amounts: --amounts",
        ),
        (["--server", "a:1", "report", "m.pt"], "as in secateur report --server (try secateur --"),
        (["--server=a:1"], "--server: options come after the command, as in secateur COMMAND"),
        (["checkpoints", "--token", "x", "ls"], "as in secateur checkpoints ls --token (try"),
        (
            ["checkpoints", "ls", "x"],
            "unexpected extra argument (x) (try secateur checkpoints ls --h",
        ),
        (["report", "m.pt", "--timeout", "soon"], "'soon' is not a number of seconds"),
        (["finalize", "m.pt"], "missing option '-o' / '--out'"),
        (["finalize", "m.pt", "-o", "o.pt", "--output", "shrunk"], "--output shrunk and --spec"),
        (["prune", "m.pt", "--keep", "--method", "lamp", "--output", "packed"], "give -o as well"),
    ],
)
def test_wrong_usage_is_one_line_and_exits_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert line.startswith("secateur: error: ")
    assert said in line
    assert "--help)" in line
    assert "positional" not in line  # not Python's words


def test_a_percentage_is_an_amount(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = model.with_name("out.safetensors")
    assert run("prune", model, "-o", out, "--method=l1_unstructured", "--amount", "50%") == 0
    assert (load_file(out)["conv.weight"] == 0).sum() == 12
    capsys.readouterr()
    assert run("plan", model, "--amounts", "12.5%,1,50%", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert [planned["amount"] for planned in plan["amounts"]] == [0.125, 1, 0.5]


def test_finalize_removes_the_units_of_the_groups_of_a_spec(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members = [{"tensor": "fc.weight"}, {"tensor": "fc.bias"}]
    rule = {"method": "grouped", "groups": [{"name": "g", "members": members}], "amount": 1}
    spec, zeros, out = tmp_path / "spec.json", tmp_path / "zeros.safetensors", tmp_path / "o.pt"
    spec.write_text(json.dumps({"rules": [rule]}))
    assert run("prune", model, "-o", zeros, "--spec", spec) == 0
    shrunk = "--output", "shrunk", "--prior", "zeros", "--spec"
    assert run("finalize", zeros, "-o", out, *shrunk, spec) == 0
    assert "40 -> 35 parameters" in capsys.readouterr().out
    found = torch.load(out)
    assert np.array_equal(found["fc.weight"], WEIGHTS["fc.weight"][1:])
    assert np.array_equal(found["fc.bias"], WEIGHTS["fc.bias"][1:])
    spec.write_text(json.dumps({"rules": [{"method": "lamp", "amount": 1, "tensors": "*"}]}))
    message = failure(capsys, "finalize", zeros, "-o", tmp_path / "p.pt", *shrunk, spec)
    assert message.endswith("no rule has groups; use the method `grouped`\n")


def test_prune_and_finalize_print_json_or_nothing(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, final = model.with_name("out.safetensors"), model.with_name("final.safetensors")
    prune = ["prune", model, "-o", out, "--method", "l1_unstructured", "--amount", "0.5"]
    prune += ["--output", "reparametrized", "--timeout", "60"]
    finalize = ["finalize", out, "-o", final, "--timeout", "60"]
    for command in (prune, finalize):
        assert run(*command, "--json") == 0
        shown = capsys.readouterr()
        report = json.loads(shown.out)
        assert report["tensors"]["conv.weight"]["zeros"] == 12
        assert "checkpoint" not in report
        assert run(*command, "--quiet") == 0
        assert capsys.readouterr() == ("", "")
    assert run("finalize", final, "-o", final, "--quiet", "--tensors", "nothing") == 1
    assert capsys.readouterr().err.startswith("secateur: ")
    assert run(*prune[:2], "--keep", *prune[4:8], "--json") == 0
    kept = json.loads(capsys.readouterr().out)["checkpoint"]
    assert run("checkpoints", "rm", kept, "--timeout", "60") == 0


@pytest.mark.parametrize(
    "command",
    [
        ["prune", "{model}", "-o", "{out}", "--method=l1_unstructured", "--amount=1"],
        ["report", "{model}"],
        ["plan", "{model}"],
        ["sensitivity", "{model}"],
        ["finalize", "{model}", "-o", "{out}"],
        ["checkpoints", "ls"],
        ["checkpoints", "put", "{model}"],
        ["checkpoints", "get", "checkpoints/x", "-o", "{out}"],
        ["checkpoints", "rm", "checkpoints/x"],
    ],
)
def test_every_command_that_calls_a_server_has_a_timeout(
    model: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    names = {"model": model, "out": model.with_name("out.safetensors")}
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        arguments = [part.format(**names) for part in command]
        said = failure(capsys, *arguments, "--server", address, "--timeout", "0.1")
    assert "not done within the timeout of 0.1 s" in said


def test_a_failed_command_leaves_the_old_file(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = model.with_name("out.safetensors")
    out.write_bytes(b"before")
    failure(capsys, *("finalize", model, "-o", out, "--tensors", "nothing"))
    assert out.read_bytes() == b"before"


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_file_that_is_replaced_keeps_its_mode_and_a_new_one_has_the_umask(
    model: Path, suffix: str
) -> None:
    replaced, new = model.with_name(f"old.{suffix}"), model.with_name(f"new.{suffix}")
    replaced.write_bytes(b"before")
    replaced.chmod(0o640)
    before = os.umask(0o027)
    try:
        assert run("finalize", model, "-o", new) == 0
        os.umask(0o077)
        assert run("finalize", model, "-o", replaced) == 0
    finally:
        os.umask(before)
    modes = [path.stat().st_mode & 0o777 for path in (replaced, new)]
    assert modes == [0o640, 0o640]
    assert replaced.read_bytes() != b"before"


# A process in the background of a shell ignores the signal, and so do those that it starts.
IN_IMPORTS = """
import os, signal, sys, secateur_command

signal.signal(signal.SIGINT, signal.default_int_handler)

class Interrupting:
    def find_spec(self, name, *_):
        if name == "numpy":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
secateur_command.run()
"""


def test_an_interrupt_is_one_line_even_during_imports(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = subprocess.run([sys.executable, "-c", IN_IMPORTS], capture_output=True, timeout=300)
    assert (ended.returncode, ended.stderr) == (1, b"secateur: interrupted\n")

    def interrupt(*_: object, **__: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr("secateur.cli.group.LazyGroup.make_context", interrupt)
    assert failure(capsys, "report") == "secateur: interrupted\n"


@pytest.mark.parametrize("arguments", [["report", "{model}"], ["--help"], ["report", "none.pt"]])
def test_a_full_disk_is_one_line(model: Path, arguments: list[str]) -> None:
    code = "import secateur_command; secateur_command.run()"
    command = [sys.executable, "-c", code, *(part.format(model=model) for part in arguments)]
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
    reason = "none.pt: No such file or directory"
    if "none.pt" not in arguments:
        reason = "standard output: No space left on device"
    assert (ended.returncode, ended.stderr) == (1, f"secateur: {reason}\n")


URI = "s3://bucket/model.safetensors"


@pytest.mark.parametrize("command", [["report", URI], ["finalize", "{model}", "-o", URI]])
def test_uris_that_need_a_server(
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
) -> None:
    monkeypatch.delenv("SECATEUR_SERVER")
    assert cli.main([argument.format(model=model) for argument in command]) == 1
    line = f"secateur: {URI}: without a server only file:// URIs can be opened: give --server, "
    assert capsys.readouterr().err.startswith(line)


def test_without_a_server_one_is_embedded(model: Path) -> None:
    """The installed command, in a process of its own."""
    command = [str(Path(sys.executable).with_name("secateur")), "report", str(model)]
    environment = {k: v for k, v in os.environ.items() if k != "SECATEUR_SERVER"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "0.00%" in ended.stdout.splitlines()[-1]


@pytest.mark.parametrize("form", ["dense", "reparametrized"])
@pytest.mark.parametrize("is_tied", [False, True])
def test_an_embedded_server_writes_the_file_that_the_client_would_write(
    server: RunningServer, tmp_path: Path, form: str, is_tied: bool
) -> None:
    """It opens and writes both files itself, and sends no weights."""
    model, names = tmp_path / "a model.safetensors", ["embed.weight", "head.weight"]
    tensors = {
        names[0]: np.random.default_rng(0).standard_normal((8, 6), np.float32),
        "norm.bias": np.arange(1, 7, dtype=np.float32),
        "steps": np.array(3),
    }
    ties = {"format": "pt", names[1]: names[0]} if is_tied else {"format": "pt"}
    save_file(tensors, model, metadata=ties)
    arguments = ["--method", "l1_unstructured", "--amount", "0.5", "--output", form, "--quiet"]
    written = []
    for index, more in enumerate([[], ["--server", server.address]]):
        out = tmp_path / f"out {index}.safetensors"
        assert cli.main(["prune", str(model), "-o", str(out), *arguments, *more]) == 0
        final = tmp_path / f"final {index}.safetensors"
        assert cli.main(["finalize", str(out), "-o", str(final), "--quiet", *more]) == 0
        written.append([out.read_bytes(), final.read_bytes()])
    assert written[0] == written[1]
