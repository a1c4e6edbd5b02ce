"""Each choice of the contract is in the registry of its part, on both ends, and no other one is."""

import sys
from collections.abc import Collection
from typing import Any

import numba
import pytest
import torch

import secateur
from secateur import choices, forms
from secateur.channel import _SERVICE_CONFIG
from secateur_proto import plan_pb2, pruner_pb2, spec_pb2
from secateur_proto.enums import values_by_name
from secateur_server.cut import allocation
from secateur_server.granularity import GRANULARITIES
from secateur_server.importance import IMPORTANCES
from secateur_server.outputs import OUTPUTS
from secateur_server.spec import decode
from secateur_server.spec.amounts import AMOUNTS


def in_oneof(name: str, message: Any = spec_pb2.Selection) -> set[str]:
    return {field.name for field in message.DESCRIPTOR.oneofs_by_name[name].fields}


@pytest.mark.parametrize(
    ("enum", "registry"),
    [
        (pruner_pb2.Output, OUTPUTS),
        (spec_pb2.Granularity, {*GRANULARITIES, spec_pb2.GRANULARITY_GROUP}),
        (spec_pb2.Scope, decode.SCOPES),
        (spec_pb2.Allocation, decode.ALLOCATIONS),
        (spec_pb2.Combination, decode.COMBINATIONS),
        (spec_pb2.Normalization, decode.NORMALIZATIONS),
    ],
)
def test_a_registry_of_the_server_has_the_values_of_its_enum(
    enum: Any, registry: Collection[int]
) -> None:
    assert set(registry) - {0} == set(enum.values()) - {0}


def test_each_allocation_of_a_rule_divides_amounts() -> None:
    known = {*allocation.ALLOCATIONS, *allocation.TABLES}
    assert known == set(decode.ALLOCATIONS.values())
    assert known == set(values_by_name(spec_pb2.Allocation.DESCRIPTOR))


def test_the_importances_are_those_of_the_contract() -> None:
    assert set(IMPORTANCES) == set(choices.IMPORTANCES) == in_oneof("importance")


def test_the_amounts_are_those_of_the_contract() -> None:
    assert set(AMOUNTS) == in_oneof("amount")
    assert set(AMOUNTS) >= in_oneof("amount", plan_pb2.Amount)


def test_the_client_has_a_form_for_each_output_with_data() -> None:
    numbers = {forms.OUTPUTS[name] for name in forms.FORMS}
    assert numbers == {number for number in OUTPUTS if number and OUTPUTS[number].has_data}


def test_a_form_is_a_model_if_its_output_has_all_tensors() -> None:
    for name, number in forms.OUTPUTS.items():
        assert forms.is_model(name) == OUTPUTS[number].needs_all_tensors


def test_the_info_of_a_server_lists_its_registries(client: secateur.Client) -> None:
    info = client.server_info()
    assert info.outputs == tuple(forms.OUTPUTS)
    assert info.granularities == tuple(values_by_name(spec_pb2.Granularity.DESCRIPTOR))
    assert info.scopes == tuple(values_by_name(spec_pb2.Scope.DESCRIPTOR))
    assert info.allocations == tuple(values_by_name(spec_pb2.Allocation.DESCRIPTOR))
    assert (info.importances, info.amounts) == (tuple(IMPORTANCES), tuple(AMOUNTS))


def test_the_info_of_a_server_has_its_device_and_versions(client: secateur.Client) -> None:
    info = client.server_info()
    assert info.device.startswith("cuda" if torch.cuda.is_available() else "cpu")
    assert info.versions == {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "numba": numba.__version__,
    }


def test_grpc_repeats_the_calls_that_change_nothing_and_have_one_answer() -> None:
    config: Any = _SERVICE_CONFIG
    (repeated,) = config["methodConfig"]
    assert {(name["service"], name["method"]) for name in repeated["name"]} == {
        *(("secateur.v1.Pruner", name) for name in ("Report", "Plan", "GetServerInfo")),
        *(("secateur.v1.Checkpoints", name) for name in ("QueryUpload", "Get", "List")),
    }
