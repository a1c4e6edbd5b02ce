"""REAP: experts whose weighted outputs are small (Lasby et al. 2025)."""

from secateur.calibration.layer import Doubles
from secateur.calibration.statistics import Statistics
from secateur.calibration.unit_statistics import UnitStatistics
from secateur.errors import InvalidSpec, InvalidStatistics
from secateur.grouping import Groups
from secateur.units.flap import check_statistics
from secateur.units.slices import checked_groups
from secateur_proto import spec_pb2 as pb


def reap(statistics: Statistics, groups: Groups) -> dict[str, Doubles]:
    """Scores experts by their weighted outputs, as REAP does: Router-weighted Expert Activation.

    An expert's score is the mean of its weight times the norm of its output, over the tokens that
    the router gives to it. An expert without tokens has 0.

    Args:
        statistics: What `calibrate` returns for a model of transformers 5 with experts.
        groups: What `transformer_groups` returns for "experts".

    Returns:
        The scores of each group, in float64: `importance_scores` of `grouped`.

    Raises:
        InvalidSpec: The groups are wrong.
        InvalidStatistics: They lack the experts of a group, or have others.
    """
    check_statistics(statistics)
    named = checked_groups(groups)
    return {name: _experts(statistics, group).means for name, group in named.items()}


def _experts(statistics: Statistics, group: pb.Group) -> UnitStatistics:
    for member in group.members:
        found = statistics.experts.get(member.tensor.rpartition(".")[0])
        if found is None or member.dim != 0:
            continue
        if member.units not in (0, found.units) or member.indices or member.stride > 1:
            raise InvalidSpec(f"{group.name}: {member.tensor}: a unit is not one expert")
        return found
    names = ", ".join(sorted({member.tensor for member in group.members}))
    raise InvalidStatistics(f"{group.name}: the statistics have no experts among {names}")
