"""The page docs/team.md, step by step: certificate, tokens, server, calls, Prometheus."""

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

# The commands that do not end, and what is true when they serve.
SERVING = {
    "secateur-server": "grep -q 'serving gRPC' log",
    "prometheus": "grep -q 'ready to receive web requests' log",
}


@pytest.mark.slow
def test_the_steps_of_the_page_work(tmp_path: Path) -> None:
    for program in ("openssl", "prometheus", "promtool"):
        if shutil.which(program) is None:
            pytest.skip(f"no {program}: make system")
    shutil.copytree("deploy", tmp_path / "deploy")
    weights = np.random.default_rng(0).standard_normal((100, 100), np.float32)
    save_file({"fc.weight": weights}, tmp_path / "model.safetensors")

    ended = run(script(), tmp_path)

    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "to the tenants vision" in ended.stdout
    assert (load_file(tmp_path / "pruned.safetensors")["fc.weight"] == 0).sum() == 5000
    up, handled = ended.stdout.splitlines()[-2:]
    assert "=> 1 @" in up
    assert 'grpc_method="Prune"' in handled
    assert re.search(r"=> [1-9]\d* @", handled), handled


def script() -> str:
    """Joins the steps, on free ports; programs that serve run in the background."""
    found = re.findall(r"```(bash|py)\n(.*?)```", Path("docs/team.md").read_text(), re.DOTALL)
    steps = [f"python - <<'END'\n{code}END\n" if kind == "py" else code for kind, code in found]
    whole = "set -eu\ntrap 'kill $(jobs -p)' EXIT\n" + "".join(map(in_background, steps))
    whole = whole.replace("prune.example.com:", "localhost:")
    for port in (50051, 9464, 9090):
        whole = re.sub(rf"(0\.0\.0\.0|127\.0\.0\.1|localhost):{port}", rf"\1:{free_port()}", whole)
    return whole


def in_background(step: str) -> str:
    *others, last = step.strip().replace("\\\n", "").splitlines()
    program, *options = last.split()
    if program in SERVING and "--check" not in options:
        ready = SERVING[program]
        last = f"{last} >> log 2>&1 &\nuntil {ready}; do kill -0 $!; sleep 0.1; done"
    if program == "promtool":  # the first scrape is up to 15 seconds later
        others = [f"until {others[0]} | grep -q '=> 1 @'; do sleep 1; done", *others]
    return "\n".join([*others, last, ""])


def run(commands: str, folder: Path) -> subprocess.CompletedProcess[str]:
    programs = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    command = ["timeout", "--signal=TERM", "120", "bash", "-c", commands]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port
