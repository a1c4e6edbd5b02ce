"""Every error of the Python client, as it is raised."""

import pickle
import re
import socket
from collections.abc import Callable, Iterator
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.conftest import start_server, stop_server
from tests.contract.raw import entry, file
from torch.nn.utils import prune

import secateur

# What torch.load says of pickles that torch.save does not write.
pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")

WEIGHT = torch.arange(1.0, 13).reshape(4, 3)
MODEL = {"fc.weight": WEIGHT, "fc.bias": torch.ones(4), "steps": torch.arange(4)}
HALF = secateur.l1_unstructured("fc.weight", 0.5)


@pytest.fixture(scope="module")
def small() -> Iterator[secateur.Client]:
    """A server that takes models of up to 1 KiB."""
    running = start_server("--max-model-bytes", "1KiB")
    with secateur.Client(running.address) as client:
        yield client
    stop_server(running)


def path_of(kind: str, path: Path) -> Path:
    """A file of that kind with a good model in it."""
    path = path / f"model.{kind}"
    if kind == "safetensors":
        safetensors.torch.save_file(MODEL, path)
    else:
        torch.save(MODEL, path)
    return path


SELECTION = "spec.rules[0].selection"


@pytest.mark.parametrize(
    ("spec", "field", "part"),
    [
        pytest.param(
            secateur.l1_unstructured("fc.wieght", 1),
            f"{SELECTION}.tensors[0]",
            "fc.weight",
            id="name",
        ),
        pytest.param(
            secateur.l1_unstructured("steps", 1), f"{SELECTION}.tensors[0]", "I64", id="dtype"
        ),
        pytest.param(
            secateur.l1_unstructured("fc.weight", 13), f"{SELECTION}.count", "13 .* 12", id="count"
        ),
        pytest.param(
            secateur.ln_structured("fc.weight", 1, n=2, dim=2), f"{SELECTION}.dim", "2", id="dim"
        ),
        pytest.param(
            secateur.random_structured("fc.bias", 1, dim=0), f"{SELECTION}.dim", "fc.bias", id="1-D"
        ),
        pytest.param(
            secateur.ln_structured("fc.weight", 1, n=float("nan"), dim=0),
            f"{SELECTION}.magnitude.p",
            "NaN",
            id="norm",
        ),
        pytest.param(
            secateur.l1_unstructured("fc.weight", 1, {"fc.weight": WEIGHT.T}),
            f"{SELECTION}.importance_scores['fc.weight']",
            r"\[4, 3\].*\[3, 4\]",
            id="scores",
        ),
        pytest.param(
            secateur.custom_from_mask({"fc.weight": WEIGHT}),
            "spec.rules[0].custom_masks.masks['fc.weight']",
            r"2\.0 at \[0, 1\]",
            id="mask",
        ),
        pytest.param(secateur.Spec(()), "spec.rules", "at least one", id="no rules"),
    ],
)
def test_a_spec_that_does_not_fit_is_an_invalid_spec_with_its_field(
    client: secateur.Client, spec: secateur.Spec, field: str, part: str
) -> None:
    with pytest.raises(secateur.InvalidSpec, match=part) as raised:
        client.prune(MODEL, spec)
    assert raised.value.field == field
    assert isinstance(raised.value, ValueError)


@pytest.mark.parametrize("call", [secateur.Client.report, secateur.Client.finalize])
def test_names_that_fit_nothing_are_an_invalid_spec(
    client: secateur.Client, call: Callable[..., Any]
) -> None:
    with pytest.raises(secateur.InvalidSpec, match=r"fc\.weight") as raised:
        call(client, MODEL, tensors=["*", "fc.wieght"])
    assert raised.value.field == "header.tensors[1]"


def test_nan_in_a_weight_is_an_invalid_spec(client: secateur.Client) -> None:
    model = {**MODEL, "fc.weight": torch.where(WEIGHT > 4, float("nan"), WEIGHT)}
    with pytest.raises(secateur.InvalidSpec, match=r"\[1, 1\].* 8 of 12") as raised:
        client.prune(model, HALF)
    assert raised.value.field == "data['fc.weight']"


@pytest.mark.parametrize(
    ("model", "field"),
    [
        ({"w": WEIGHT, "w_orig": WEIGHT, "w_mask": torch.ones(4, 3)}, "data['w']"),
        ({"w_orig": WEIGHT, "w_mask": torch.ones(3, 4)}, "data['w_mask']"),
        ({"w_orig": WEIGHT, "w_mask": WEIGHT}, "data['w_mask']"),
    ],
)
def test_a_pair_that_is_none_is_an_invalid_state_dict(
    client: secateur.Client, model: dict[str, torch.Tensor], field: str
) -> None:
    with pytest.raises(secateur.InvalidStateDict) as raised:
        client.report(model)
    assert raised.value.field == field
    assert isinstance(raised.value, ValueError)


def test_a_model_above_the_limit_is_too_large(small: secateur.Client) -> None:
    large = {"w": np.zeros(10_000_000, np.float32)}
    for call in (lambda: small.report(large), lambda: small.prune(large, HALF)):
        with pytest.raises(secateur.ModelTooLarge, match=r"header.data_bytes: 4\d{7} bytes.* 1024"):
            call()
    assert small.report(MODEL).total == 16


def test_where_no_server_is_it_is_unavailable() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # taken, but not listened at
        with secateur.Client(f"127.0.0.1:{free.getsockname()[1]}") as client:
            for call in (client.report, client.finalize, lambda source: client.prune(source, HALF)):
                with pytest.raises(secateur.Unavailable):
                    call(MODEL)


def test_a_timeout_is_a_deadline_exceeded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it listens, and says nothing
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with (
            secateur.Client(address, timeout=0.2) as client,
            pytest.raises(secateur.DeadlineExceeded) as raised,
        ):
            client.prune(MODEL, HALF)
    assert isinstance(raised.value, TimeoutError)
    assert raised.value.field is None


def test_a_long_message_does_not_hide_what_is_wrong(client: secateur.Client) -> None:
    names = [f"{'😀' * 300}{number}" for number in range(4)]
    for _ in range(30):  # gRPC drops statuses of more than 8 KiB, by chance
        with pytest.raises(secateur.InvalidSpec):
            client.report(dict.fromkeys(names, WEIGHT), tensors="😀" * 300)


class Touch:
    """Pickled, it is a call that makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))]
)
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_code_in_a_pickle_never_runs(
    client: secateur.Client, tmp_path: Path, write: Callable[[Any, Path], Any], suffix: str
) -> None:
    path, touched = tmp_path / f"model{suffix}", tmp_path / "touched"
    write({"w": Touch(touched)}, path)
    with pytest.raises(secateur.InvalidStateDict, match=re.escape(str(path))):
        client.report(path)
    assert not touched.exists()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (WEIGHT, "Tensor"),
        ([WEIGHT], "list"),
        (torch.nn.Linear(2, 2), "state_dict"),
        ({"epoch": 3, "w": WEIGHT}, "epoch"),
        ({"model": {"w": WEIGHT}}, "model"),
        ({1: WEIGHT}, "text"),
    ],
)
def test_a_file_of_torch_that_holds_no_state_dict_is_refused(
    client: secateur.Client, tmp_path: Path, value: Any, said: str
) -> None:
    torch.save(value, tmp_path / "model.pt")
    with pytest.raises(secateur.InvalidStateDict, match=said):
        client.report(tmp_path / "model.pt")


BYTES = {}
for zipped in (True, False):
    written = BytesIO()
    torch.save(MODEL, written, _use_new_zipfile_serialization=zipped)
    BYTES[zipped] = written.getvalue()


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.booleans())
def test_a_spoilt_file_of_torch_is_read_or_refused(
    tmp_path: Path, data: st.DataObject, zipped: bool
) -> None:
    content = bytearray(BYTES[zipped])
    for place in data.draw(st.lists(st.integers(0, min(len(content), 1500) - 1), max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    length = data.draw(st.just(len(content)) | st.integers(0, len(content)))
    (tmp_path / "model.pt").write_bytes(content[:length])
    refused = None
    try:
        secateur.is_pruned(tmp_path / "model.pt")
    except secateur.InvalidStateDict as error:
        refused = str(error)
    assert refused is None or ": " in refused


@pytest.mark.parametrize("kind", ["safetensors", "pt", "pth"])
@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused(
    client: secateur.Client, tmp_path: Path, kind: str, share: float
) -> None:
    path = path_of(kind, tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(secateur.InvalidStateDict, match=re.escape(str(path))):
        client.report(path)


ENTRY = entry("F32", [1], 0, 4)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(file({"w": ENTRY}, bytes(5)), id="padded"),
        pytest.param(file({"w": {**ENTRY, "more": 1}}, bytes(4)), id="a key too many"),
        pytest.param(file({"w": {**ENTRY, "dtype": "F31"}}, bytes(4)), id="unknown dtype"),
        pytest.param(
            file(b'{"w":%b,"w":%b}' % ((str(ENTRY).replace("'", '"').encode(),) * 2), bytes(4)),
            id="a name twice",
        ),
    ],
)
def test_a_bad_safetensors_file_is_refused(
    client: secateur.Client, tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(secateur.InvalidStateDict, match=re.escape(str(path))):
        client.report(path)


@pytest.mark.parametrize("kind", ["safetensors", "pt", "pth"])
def test_a_file_that_is_not_there_or_a_folder_is_refused(
    client: secateur.Client, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / f"model.{kind}"
    with pytest.raises(secateur.InvalidStateDict, match=f"{re.escape(str(path))}: .*No such file"):
        client.report(path)
    path.mkdir()
    with pytest.raises(secateur.InvalidStateDict, match=re.escape(str(path))):
        client.report(str(path))


@pytest.mark.parametrize("name", ["model", "model.bin", "model.safetensors.gz", "model.PT"])
def test_a_file_of_another_kind_is_refused(
    client: secateur.Client, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_bytes(safetensors.torch.save(MODEL))
    with pytest.raises(secateur.InvalidStateDict, match=r"neither \.safetensors nor \.pt"):
        client.report(tmp_path / name)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        pytest.param([WEIGHT], "list", id="list"),
        pytest.param(WEIGHT, "Tensor", id="tensor"),
        pytest.param(None, "NoneType", id="None"),
        pytest.param("s3://bucket/model.safetensors", "s3://bucket", id="URI"),
        pytest.param({1: WEIGHT}, "text", id="a number as a name"),
        pytest.param({"w": [1.0, 2.0]}, "w: list", id="list as a tensor"),
        pytest.param({"w": 1.0}, "w: float", id="number as a tensor"),
        pytest.param({"w": None}, "w: NoneType", id="None as a tensor"),
        pytest.param({"w": np.array(["a"])}, "w: dtype str", id="array of text"),
        pytest.param({"w": np.array([None])}, "w: dtype object", id="array of objects"),
        pytest.param({"w": WEIGHT.to(torch.complex128)}, "w: dtype complex128", id="complex128"),
        pytest.param({"w": WEIGHT.to_sparse()}, "w: only dense", id="sparse"),
        pytest.param({"w": WEIGHT.to("meta")}, "w: only dense", id="meta"),
        pytest.param({"\ud800": WEIGHT}, r"\\ud800", id="a name that is no text"),
        pytest.param({"__metadata__": WEIGHT}, "__metadata__", id="a name that is taken"),
    ],
)
def test_a_source_that_is_no_model_is_refused(
    client: secateur.Client, source: Any, said: str
) -> None:
    with pytest.raises(secateur.InvalidStateDict, match=said):
        client.report(source)


def test_a_module_with_two_hooks_for_one_parameter_is_refused(client: secateur.Client) -> None:
    module = torch.nn.Linear(3, 2)
    prune.identity(module, "weight")  # type: ignore[no-untyped-call]
    second = prune.L1Unstructured(1)
    second._tensor_name = "weight"
    module.register_forward_pre_hook(second)
    spec = secateur.l1_unstructured("weight", 1)
    calls: list[Callable[[], object]] = [
        lambda: client.prune(module, spec),
        lambda: client.report(module),
        lambda: client.finalize(module),
    ]
    for call in calls:
        with pytest.raises(secateur.InvalidStateDict, match="weight: has 2 pruning hooks"):
            call()


def make(method: Callable[..., secateur.Spec], *arguments: Any, **options: Any) -> Any:
    return lambda: method(*arguments, **options)


L1, LN = secateur.l1_unstructured, secateur.ln_structured
RANDOM = secateur.random_unstructured


@pytest.mark.parametrize(
    ("build", "said"),
    [
        *(
            pytest.param(make(L1, "w", amount), f"amount: {said}", id=f"amount {amount!r}")
            for amount, said in [
                (True, "True"),
                ("0.5", "'0.5'"),
                (None, "None"),
                (1j, "1j"),
                (-1, "-1"),
                (2**64, str(2**64)),
                (1.5, "1.5"),
                (-0.1, "-0.1"),
                (Fraction(3, 2), "3/2"),
                (np.float32(2), "2.0"),
                (float("nan"), "nan"),
                (float("inf"), "inf"),
            ]
        ),
        *(
            pytest.param(make(RANDOM, "w", 1, seed=seed), f"seed: {seed!r}", id=f"seed {seed!r}")
            for seed in (-1, 2**64, 1.0, "1", True)
        ),
        *(
            pytest.param(make(LN, "w", 1, n=2, dim=dim), f"dim: {dim!r}", id=f"dim {dim!r}")
            for dim in ("0", 0.0, True, 2**31, None)
        ),
        *(
            pytest.param(make(LN, "w", 1, n=n, dim=0), f"n: {n!r}", id=f"n {n!r}")
            for n in ("abc", "2", True, None)
        ),
        *(
            pytest.param(make(L1, names, 1), "tensors: ", id=f"tensors {names!r}")
            for names in ([], (), [1], [None], None, 5, b"w", "\ud800")
        ),
        pytest.param(make(L1, "w", 1, 5), "importance_scores", id="scores are a number"),
        pytest.param(make(secateur.custom_from_mask, {}), "masks", id="no masks"),
        pytest.param(make(secateur.custom_from_mask, [1]), "masks", id="masks are a list"),
        pytest.param(
            make(secateur.global_unstructured, "w", 1, importance="l2"), "importance: 'l2'", id="l2"
        ),
        pytest.param(
            make(secateur.global_unstructured, "w", 1, "random", importance_scores={"w": WEIGHT}),
            "importance_scores",
            id="random with scores",
        ),
    ],
)
def test_a_spec_that_fits_no_model_is_refused_where_it_is_made(
    build: Callable[[], secateur.Spec], said: str
) -> None:
    with pytest.raises(secateur.InvalidSpec, match=re.escape(said)):
        build()


def test_scores_and_masks_that_are_no_arrays_are_named_by_their_tensor(
    client: secateur.Client,
) -> None:
    """In the data they have names that the caller never gave."""
    for spec in (
        L1("fc.weight", 1, {"fc.weight": [1]}),
        secateur.custom_from_mask({"fc.weight": 5}),
    ):
        with pytest.raises(secateur.SecateurError, match=r"fc\.weight.*(list|int)"):
            client.prune(MODEL, spec)


def test_what_is_no_spec_and_no_pattern_is_refused(client: secateur.Client) -> None:
    with pytest.raises(secateur.InvalidSpec, match="NoneType"):
        client.prune(MODEL, None)  # type: ignore[arg-type]
    for wrong in (5, "\ud800", [1]):
        with pytest.raises(secateur.InvalidSpec, match="tensors"):
            client.report(MODEL, tensors=wrong)  # type: ignore[arg-type]


def test_lazily_negated_tensors_are_read(client: secateur.Client) -> None:
    """torch keeps the imaginary part of a conjugate as a view with its sign to be turned."""
    negated = torch.tensor([1 + 2j, 3 - 0j]).conj().imag
    assert negated.is_neg()
    assert client.report({"w": negated}).zeros == 1
