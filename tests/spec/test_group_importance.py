"""An importance that cannot score groups is refused with groups, before any data is read."""

import pytest

import secateur
from secateur_server.errors import InvalidSpec
from secateur_server.importance import IMPORTANCES
from secateur_server.importance.nuclear import Nuclear
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.decode import decode_spec


def test_groups_need_an_importance_that_scores_them(monkeypatch: pytest.MonkeyPatch) -> None:
    group = secateur.group("units", secateur.member("a", dim=0))
    message, _ = secateur.grouped([group], 0.5).encode({})
    assert decode_spec(RequestContext(), message)
    # A kind that has no order of a norm for the members of a group.
    monkeypatch.setitem(IMPORTANCES, "magnitude", lambda *_: Nuclear(0))
    with pytest.raises(InvalidSpec, match=r"selection\.granularity: GRANULARITY_GROUP needs"):
        decode_spec(RequestContext(), message)
