"""Schedules, and the specs of their steps."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.nn.utils import prune

import secateur
from secateur import InvalidSpec, Spec
from secateur.schedules import SCHEDULES, cubic, exponential, linear, one_shot
from secateur_proto import spec_pb2 as pb

PARTS = st.floats(0, 1)
RNG = np.random.default_rng(11)
MODEL = {
    "a": RNG.standard_normal((13, 7)).astype(np.float32),
    "b": RNG.standard_normal(60).astype(np.float32),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values())
@given(s=PARTS, t=PARTS, final=PARTS)
def test_a_share_begins_at_0_ends_at_1_and_never_falls(
    schedule: Callable[[float, float], float], s: float, t: float, final: float
) -> None:
    early, late = sorted((s, t))
    assert 0.0 <= schedule(early, final) <= schedule(late, final) + 1e-12
    assert schedule(late, final) <= 1.0
    assert schedule(0.0, final) == 0.0
    assert schedule(1.0, final) == 1.0


@given(steps=st.integers(1, 50), final=PARTS)
def test_cubic_is_zhu_and_guptas(steps: int, final: float) -> None:
    """Their s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3, with s_i = t_0 = 0 and dt = 1."""
    for step in range(1, steps + 1):
        sparsity = final + (0.0 - final) * (1.0 - step / steps) ** 3
        assert final * cubic(step / steps, final) == pytest.approx(sparsity, abs=1e-15)


@given(steps=st.integers(1, 50), final=st.floats(0, 0.999999))
@example(steps=3, final=5e-324)
def test_exponential_takes_the_same_fraction_of_unpruned_units(steps: int, final: float) -> None:
    left = [1.0 - final * exponential(step / steps, final) for step in range(steps + 1)]
    each = [after / before for before, after in pairwise(left)]
    assert each == pytest.approx([(1.0 - final) ** (1.0 / steps)] * steps, rel=1e-9)


def test_the_others_by_hand() -> None:
    assert [one_shot(t, 0.5) for t in (0.0, 0.25, 1.0)] == [0.0, 1.0, 1.0]
    assert [linear(t, 0.5) for t in (0.0, 0.25, 1.0)] == [0.0, 0.25, 1.0]
    assert [exponential(t, 1.0) for t in (0.0, 0.25, 1.0)] == [0.0, 1.0, 1.0]
    assert exponential(0.5, 0.75) == pytest.approx(2 / 3)  # of 0.75: 0.5, then 0.5 of the rest


def selection(spec: Spec, index: int = 0) -> pb.Selection:
    return spec.rules[index].message.selection


def test_a_step_is_the_same_spec_with_less_of_all_units() -> None:
    spec = secateur.select("*", 0.8, scope="global", guard_rails={"keep_last": True})
    found = selection(spec.at(1, 2, "linear"))
    expected = pb.Selection()
    expected.CopyFrom(selection(spec))
    expected.fraction, expected.of_all = 0.4, True
    assert found == expected
    assert selection(spec).fraction == 0.8  # which is as it was
    assert not selection(spec).of_all


@pytest.mark.parametrize("schedule", [*SCHEDULES, lambda t: t * 0.5])
@pytest.mark.parametrize("amount", [0.1, 0.7, 1 / 3, 0.99])
def test_the_last_step_is_the_whole_amount(
    schedule: str | Callable[[float], float], amount: float
) -> None:
    assert selection(secateur.l1_unstructured("*", amount).at(7, 7, schedule)).fraction == amount


def test_counts_and_tables_are_scaled_and_masks_are_not() -> None:
    mask = {"w": np.ones(3)}
    spec = (
        secateur.custom_from_mask(mask)
        + secateur.l1_unstructured("*", 10)
        + secateur.select("*", secateur.table({"a": 0.75, "*": 0.5}))
    ).at(1, 2)
    assert spec.rules[0] == secateur.custom_from_mask(mask).rules[0]
    assert selection(spec, 1).count == 9  # round(8.75)
    assert [e.fraction for e in selection(spec, 2).table.entries] == [0.75 * 0.875, 0.5 * 0.875]
    of_each = secateur.select("*", secateur.table({"a": 0.75, "*": 0.0})).at(1, 2, "exponential")
    fractions = [entry.fraction for entry in selection(of_each).table.entries]
    assert fractions == pytest.approx([0.5, 0.0])


@pytest.mark.parametrize(
    ("step", "steps", "schedule", "said"),
    [
        (0, 3, "cubic", r"^step: 0 "),
        (4, 3, "cubic", r"^step: 4 "),
        (1, 0, "cubic", r"^steps: 0 "),
        (1.0, 3, "cubic", r"^step: 1\.0 "),
        (1, 3, "cosine", r"^schedule: 'cosine' is none of one_shot, linear, cubic, exponential"),
        (3, 3, "cosine", r"^schedule: 'cosine' "),
        (1, 2, lambda t: 3 * t, r"^schedule: 1\.5 "),
        (1, 2, lambda t: float("nan"), r"^schedule: nan "),
    ],
)
def test_wrong_steps_and_schedules(
    step: int, steps: int, schedule: str | Callable[[float], float], said: str
) -> None:
    with pytest.raises(InvalidSpec, match=said):
        secateur.l1_unstructured("*", 0.5).at(step, steps, schedule)


@pytest.mark.parametrize(
    ("amount", "said"),
    [
        (secateur.threshold(0.5), "threshold"),
        (secateur.target_bytes(9), "bytes"),
        (secateur.target_macs(9, {"a": 1}), "macs"),
    ],
)
def test_amounts_without_steps(amount: secateur.amounts.Amount, said: str) -> None:
    spec = secateur.identity("*") + secateur.select("*", amount)
    with pytest.raises(InvalidSpec, match=rf"^rules\[1\]\.amount: {said} "):
        spec.at(1, 2)


def test_a_count_has_no_final_sparsity() -> None:
    with pytest.raises(InvalidSpec, match=r"^rules\[0\]\.amount: .*exponential"):
        secateur.l1_unstructured("*", 5).at(1, 2, "exponential")
    secateur.identity("*").at(1, 2, "exponential")


def pruned(state: dict[str, npt.NDArray[np.float32]]) -> int:
    return sum(int((mask == 0).sum()) for name, mask in state.items() if name.endswith("_mask"))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "spec",
    [
        secateur.global_unstructured("*", 0.77),
        secateur.select("*", 0.77, scope="global", importance="random"),
    ],
)
def test_the_steps_of_a_schedule_meet_their_totals(
    client: secateur.Client, schedule: str, spec: Spec
) -> None:
    state, units = MODEL, 13 * 7 + 60
    for step in (1, 2, 3, 4):
        state = client.prune(state, spec.at(step, 4, schedule), output="reparametrized").state_dict(
            "reparametrized"
        )
        due = 0.77 * (1.0 if step == 4 else SCHEDULES[schedule](step / 4, 0.77))
        assert pruned(state) == round(due * units)
    at_once = client.prune(MODEL, spec).masks
    for name, mask in at_once.items():  # the weights are unchanged, and so is their order
        assert (state[f"{name}_mask"].astype(bool) == mask).all()


def test_exponential_steps_are_torchs_repeated_ones(client: secateur.Client) -> None:
    module = torch.nn.Linear(32, 32)
    spec = secateur.l1_unstructured("weight", 1 - 0.5**3)
    state = {"weight": module.weight.detach().numpy().copy()}
    for step in (1, 2, 3):
        prune.l1_unstructured(module, "weight", 0.5)  # type: ignore[no-untyped-call]
        result = client.prune(state, spec.at(step, 3, "exponential"))
        assert (result.masks["weight"] == module.get_buffer("weight_mask").numpy()).all()
        state = result.state_dict("reparametrized")


def test_a_model_that_is_pruned_further_is_kept(client: secateur.Client) -> None:
    """A step that asks for less than is pruned prunes nothing more."""
    state = client.prune(MODEL, secateur.l1_unstructured("b", 40)).state_dict("reparametrized")
    step = secateur.l1_unstructured("b", 50).at(1, 2, "linear")
    result = client.prune(state, step)
    assert int((~result.masks["b"]).sum()) == 40
