"""A server accepts calls after its warm-up."""

import json
import subprocess
import sys
from pathlib import Path

import grpc
import numpy as np
import pytest

import secateur
from secateur_server import app
from secateur_server.app import App
from secateur_server.config import read_config
from secateur_server.operate.health import Health
from tests.conftest import start_command, stop_server

# It runs in its own interpreter: in this one other tests have imported and compiled everything.
FIRST_CALLS = """
import json
import sys
from collections import Counter
from importlib import import_module
from itertools import cycle
from pkgutil import iter_modules

import numpy as np
import torch
from numba.core.dispatcher import Dispatcher

import secateur
from secateur.calibration.triangle import Triangle
from secateur_server import backends
from secateur_server.app import App
from secateur_server.config import read_config

def compiled():
    return Counter({
        f"{name}.{key}": len(value.signatures)
        for name, module in list(sys.modules.items()) if name.startswith("secateur_server")
        for key, value in vars(module).items() if isinstance(value, Dispatcher)
    })

SPECS = [
    secateur.l1_unstructured("*", 0.5), secateur.random_unstructured("*", 0.5),
    secateur.ln_structured("*", 0.5, 2, 0), secateur.ln_structured("*", 3, 1, 1),
    secateur.random_structured("*", 0.5, 1), secateur.global_unstructured("*", 0.5),
]
MORE = [
    secateur.lamp("*", 0.5), secateur.erk("*", 0.5), secateur.n_m_structured("*", 2, 4),
    secateur.block_structured("*", 0.5, 4, 4), secateur.select("*", 0.5, scope="row"),
    secateur.select("*", secateur.threshold(0.1)),
]
def statistics(side):
    triangle = Triangle.of(np.eye(side))
    return secateur.Statistics({"w": secateur.LayerStatistics(1, np.ones(side), triangle=triangle)})
def unreached():
    # The kernels that were not compiled, nor are part of one that was.
    kernels = {
        key: value
        for module in iter_modules(backends.__path__) if module.name.startswith("kernels")
        if module.name != "kernels_triton"
        for key, value in vars(import_module(f"{backends.__name__}.{module.name}")).items()
        if isinstance(value, Dispatcher)
    }
    reached, more = set(), {key for key, value in kernels.items() if value.signatures}
    while more:
        reached |= more
        names = {name for key in more for name in kernels[key].py_func.__code__.co_names}
        more = (names & kernels.keys()) - reached
    return sorted(kernels.keys() - reached)
with App(read_config(["--address", "127.0.0.1:0", "--metrics-address", ""], {})) as app:
    with secateur.Client(app.address) as client:
        modules, kernels, missed = set(sys.modules), compiled(), unreached()
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            for side in (50, 1030):
                model = {name: torch.randn(side, side).to(dtype) for name in "ab"}
                for spec, output in zip(SPECS, cycle(("masks", "dense", "reparametrized"))):
                    client.prune(model, spec, output)
                pairs = client.prune(model, SPECS[0], "reparametrized")
                client.finalize(pairs.state_dict("reparametrized"))
                client.report(model, details=True)
            for side, count in ((8, 60), (8, 3), (600, 2)):
                model = {f"w{i}": torch.randn(side, side).to(dtype) for i in range(count)}
                if count > 3:
                    model["i"] = torch.ones(9, dtype=torch.int64)
                for spec in (*SPECS, *MORE):
                    client.prune(model, spec, "reparametrized")
                for spec in (SPECS[0], SPECS[-1], MORE[0]):
                    client.plan(model, spec, [0.1, 0.5])
                pairs = client.prune(model, SPECS[0], "reparametrized")
                pairs = pairs.state_dict("reparametrized")
                client.prune(pairs, SPECS[0], prior="zeros")
                client.finalize(pairs, details=True)
                client.report(pairs, details=True)
        for side in (50, 300):
            model, known = {"w": torch.randn(side, side)}, statistics(side)
            for spec in (secateur.sparsegpt("w", 0.5, known), secateur.wanda("w", 0.5, known)):
                client.prune(model, spec + secateur.refit("w", known), "dense")
    print(json.dumps([sorted(set(sys.modules) - modules), compiled() - kernels, missed]))
"""


def test_first_calls_import_no_module_and_compile_no_kernel() -> None:
    ran = subprocess.run([sys.executable, "-c", FIRST_CALLS], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    modules, kernels, missed = json.loads(ran.stdout)
    assert (modules, kernels, missed) == ([], {}, [])


def test_a_server_is_ready_after_its_warm_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    happened: list[str] = []
    address = f"unix:{tmp_path}/socket"

    def warming(*arguments: object) -> None:
        happened.append("warm-up")
        with grpc.insecure_channel(address) as channel, pytest.raises(grpc.FutureTimeoutError):
            grpc.channel_ready_future(channel).result(timeout=0.2)  # the server does not listen yet

    monkeypatch.setattr(app, "warm_up", warming)
    monkeypatch.setattr(Health, "serve", lambda health: happened.append("ready"))
    with App(read_config(["--address", address, "--metrics-address", ""], {})):
        assert happened == ["warm-up", "ready"]


def test_embedded_server_does_not_warm_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(app, "warm_up", lambda *arguments: pytest.fail("it warms up"))
    with secateur.embedded() as client:
        assert client.report({"w": np.zeros(3)}).zeros == 3


def test_warm_up_is_logged_before_serving() -> None:
    logged = stop_server(start_command())
    lines = [logged.find(text) for text in ("warming up; ", "warmed up in ", "serving gRPC at ")]
    assert 0 <= lines[0] < lines[1] < lines[2]
