"""Wrong fields of `activation`, as any caller may send them."""

import re
from collections.abc import Callable

import numpy as np
import pytest

import secateur
from secateur.spec import INPUTS, OUTPUTS, Rule, Spec
from secateur_proto import spec_pb2 as pb

Change = Callable[[pb.Selection, dict[str, dict[str, object]]], object]
PATH = "spec.rules[0].selection"


def spec_of(change: Change) -> Spec:
    """A rule that prunes `w` (3, 4) and `v` (2, 5), with a change."""
    selection = pb.Selection(
        tensors=["w", "v"],
        activation=pb.Activation(),
        granularity=pb.GRANULARITY_ELEMENT,
        scope=pb.SCOPE_PER_ROW,
        fraction=0.5,
    )
    arrays: dict[str, dict[str, object]] = {
        INPUTS: {"w": np.ones(4, np.float32), "v": np.ones(5)},
        OUTPUTS: {},
    }
    change(selection, arrays)
    return Spec((Rule(pb.Rule(selection=selection), arrays),))


def factors(value: object, field: str = INPUTS, name: str = "w") -> Change:
    return lambda _, arrays: arrays[field].update({name: value})


def exponent(p: float) -> Change:
    return lambda selection, _: setattr(selection.activation, "p", p)


WRONG: dict[str, tuple[Change, str]] = {
    "a negative exponent": (exponent(-1), "activation.p: -1.0 is not above 0 and finite"),
    "an infinite exponent": (exponent(np.inf), "activation.p: inf is not above 0 and finite"),
    "no exponent": (exponent(np.nan), "activation.p: nan is not above 0 and finite"),
    "no factors": (
        lambda _, arrays: arrays[INPUTS].pop("v"),
        "activation.inputs: 'v' is missing; send its factors, or leave it out of the rule",
    ),
    "a tensor that is not sent": (
        lambda selection, arrays: (
            arrays[INPUTS].pop("v"),
            selection.activation.inputs.update({"v": "nowhere"}),
        ),
        "activation.inputs['v']: the data does not have the tensor 'nowhere'; send it",
    ),
    "factors of another tensor": (
        factors(np.ones(3, np.float32), OUTPUTS, "other"),
        "activation.outputs['other']: the rule does not prune this tensor",
    ),
    "integers": (
        factors(np.ones(4, np.int32)),
        "activation.inputs['w']: has dtype I32; factors may be F16, BF16, F32, F64",
    ),
    "another length": (
        factors(np.ones(3, np.float32)),
        "activation.inputs['w']: has shape [3]; send 4 factors, one for each input, or 2 "
        "dimensions, each 1 or as in [3, 4]",
    ),
    "too many groups": (factors(np.ones(8, np.float32)), "activation.inputs['w']: has shape [8]"),
    "none": (factors(np.ones(0, np.float32)), "activation.inputs['w']: has shape [0]"),
    "other dimensions": (
        factors(np.ones((3, 5), np.float32), OUTPUTS),
        "activation.outputs['w']: has shape [3, 5]; send 3 factors, one for each output, or 2",
    ),
    "a negative factor": (
        factors(np.array([[1], [-2], [-3]], np.float32), OUTPUTS),
        "is -2.0 at [1, 0], and wrong in 2 of 3 elements; factors are finite and not negative",
    ),
    "NaN": (factors(np.array([1, 2, np.nan, 1])), "is nan at [2], and wrong in 1 of 4 elements"),
    "infinity": (
        factors(np.array([1, 2, 3, np.inf], np.float16)),
        "is inf at [3], and wrong in 1 of 4 elements",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_input_is_named(client: secateur.Client, kind: str) -> None:
    change, message = WRONG[kind]
    weights = {"w": np.ones((3, 4), np.float32), "v": np.ones((2, 5), np.float32)}
    pattern = rf"^{re.escape(PATH)}\.activation\.(.|\n)*{re.escape(message.split(': ', 1)[-1])}"
    for call in (client.prune, client.plan):
        with pytest.raises(secateur.InvalidSpec, match=pattern) as error:
            call(weights, spec_of(change))
        if message.startswith("activation"):
            assert str(error.value).startswith(f"{PATH}.{message.split(': ', 1)[0]}")


def test_factors_are_part_of_no_report_and_of_no_result(client: secateur.Client) -> None:
    weights = {"w": np.eye(3, 4, dtype=np.float32), "v": np.ones((2, 5), np.float32)}
    result = client.prune(weights, spec_of(lambda *_: None), "dense")
    assert list(result.state_dict()) == list(result.report.tensors) == ["w", "v"]
