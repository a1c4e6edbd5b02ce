"""Every error of the Python client, as it is raised."""

import re
import socket
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import secateur
from tests.conftest import inner_server

# A warning of torch.load about pickles that torch.save does not write.
pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")

WEIGHT = torch.arange(1.0, 13).reshape(4, 3)
MODEL = {"fc.weight": WEIGHT, "fc.bias": torch.ones(4), "flags": torch.ones(4) == 1}
HALF = secateur.l1_unstructured("fc.weight", 0.5)


@pytest.fixture(scope="module")
def small() -> Iterator[secateur.Client]:
    """A server that takes models of up to 1 KiB."""
    with (
        inner_server("--max-model-bytes", "1KiB") as running,
        secateur.Client(running.address) as client,
    ):
        yield client


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
            secateur.l1_unstructured("flags", 1), f"{SELECTION}.tensors[0]", "BOOL", id="dtype"
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
            r"\[3, 4\].*\[4, 3\]",
            id="scores",
        ),
        pytest.param(
            secateur.custom_from_mask({"fc.weight": WEIGHT}),
            "spec.rules[0].custom_masks.masks['fc.weight']",
            r"2\.0 at \[0, 1\]",
            id="mask",
        ),
        pytest.param(secateur.Spec(()), "spec.rules", "at least one", id="no rules"),
        pytest.param(
            secateur.custom_from_mask({}),
            "spec.rules[0].custom_masks.masks",
            "at least one",
            id="no masks",
        ),
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


@pytest.mark.parametrize("glob", ["zzz*", "flag*?", "step?s", "[!a-z]*"])
def test_the_error_for_a_glob_without_a_match_says_what_globs_may_mean(
    client: secateur.Client, glob: str
) -> None:
    """Tensors of integers and bools match no glob, so none is advised."""
    model = {"steps": torch.arange(4), **MODEL, "stepz": torch.arange(4)}
    for call in (
        lambda: client.report(model, tensors=glob),
        lambda: client.prune(model, secateur.l1_unstructured(glob, 0.5)),
    ):
        with pytest.raises(secateur.InvalidSpec, match="matches no floating tensor; ") as raised:
            call()
        advised = re.findall(r"'([\w.]+)'", str(raised.value).partition("tensor; ")[2])
        assert advised
        assert set(advised) <= {"fc.weight", "fc.bias"}


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
def test_a_broken_pair_is_an_invalid_state_dict(
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


def test_without_a_server_the_error_is_unavailable() -> None:
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
        pytest.param(make(secateur.custom_from_mask, [1]), "masks", id="masks are a list"),
        pytest.param(
            make(secateur.global_unstructured, "w", 1, importance="l2"), "importance: 'l2'", id="l2"
        ),
    ],
)
def test_arguments_that_cannot_be_sent_are_refused_at_once(
    build: Callable[[], secateur.Spec], said: str
) -> None:
    with pytest.raises(secateur.InvalidSpec, match=re.escape(said)):
        build()


def test_scores_and_masks_of_wrong_types_are_named_by_their_tensor(
    client: secateur.Client,
) -> None:
    """In the data they have names that the caller never gave."""
    for spec in (
        L1("fc.weight", 1, {"fc.weight": [1]}),
        secateur.custom_from_mask({"fc.weight": 5}),
    ):
        with pytest.raises(secateur.SecateurError, match=r"fc\.weight.*(list|int)"):
            client.prune(MODEL, spec)


def test_wrong_specs_and_patterns_are_refused(client: secateur.Client) -> None:
    with pytest.raises(secateur.InvalidSpec, match="is not a Spec; make one"):
        client.prune(MODEL, None)  # type: ignore[call-overload]
    for wrong in (5, "\ud800", [1]):
        with pytest.raises(secateur.InvalidSpec, match="tensors"):
            client.report(MODEL, tensors=wrong)  # type: ignore[arg-type]


def test_wrong_checkpoints_and_destinations_are_refused(client: secateur.Client) -> None:
    calls: list[Callable[[Any], object]] = [
        client.delete,
        client.checkpoint,
        lambda wrong: client.download(wrong, "o.safetensors"),
        lambda wrong: client.prune(MODEL, HALF, destination=wrong),
        lambda wrong: client.prune(MODEL, HALF, keep=True, destination=wrong),
    ]
    for call in calls:
        with pytest.raises(secateur.SecateurError, match=r"5|int"):
            call(5)
    with pytest.raises(secateur.SecateurError, match=r"'o\.safetensors' is not a URI"):
        client.finalize(MODEL, destination="o.safetensors")
    with pytest.raises(secateur.InvalidStateDict, match=r"client\.checkpoint\('checkpoints/x'\)"):
        client.report("checkpoints/x")


def test_a_certificate_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(secateur.SecateurError, match=r"absent\.pem: No such file or directory"):
        secateur.Client("localhost:1", tls=tmp_path / "absent.pem")
