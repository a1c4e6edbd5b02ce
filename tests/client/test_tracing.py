import pytest

import secateur
from tests.client.cutting import difference
from tests.client.nets import NETS, net


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("name", NETS)
def test_the_cut_model_computes_what_the_masked_model_computes(name: str) -> None:
    module, example = net(name)
    groups = secateur.groups(module, example)
    assert max(difference(module, example, groups, seed) for seed in range(3)) < 1e-12
