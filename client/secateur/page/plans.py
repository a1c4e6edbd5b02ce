"""The pages of plans and of sensitivities."""

from collections.abc import Sequence

from secateur.checks import shown
from secateur.errors import InvalidSpec
from secateur.page.bounds import bounds_table
from secateur.page.views import Column, Frame, Page, Table, Total, count, finite, share, size
from secateur.plan import Plan, PlannedAmount, Sensitivity, amount_text, is_amount
from secateur.tables import listed

# A table of more columns could not be read.
_MOST_COLUMNS = 12
# Lines of a chart: of the most, and of the least sensitive tensors.
_LINES = 4

_AMOUNTS = (
    Column("sparsity", "share"),
    Column("norm removed", "share", hue=1),
    Column("pruned", "count", is_minor=True),
    Column("bytes of kept values", "count", is_minor=True),
)
_TENSORS = (
    Column("sparsity", "share", group=(2, 3)),
    Column("norm removed", "share", hue=1),
    Column("pruned", "count", is_minor=True, group="sum"),
    Column("parameters", "count", is_minor=True, group="sum"),
)


def plan_page(plan: Plan, title: str, amount: float | None = None) -> Page:
    """Makes the page of a plan."""
    chosen = _chosen(plan, amount)
    bounds = [(amount_text(planned.amount), planned.choices) for planned in plan.amounts]
    table = _tensors(plan, chosen)
    others = _amounts(plan), bounds_table("amount", bounds)
    return Page(
        title=title,
        subtitle=f"By {plan.method}. {len(table.names):,} tensors, {len(plan.amounts):,} amounts.",
        totals=_totals(plan, plan.amounts[chosen]),
        charts=[_curve(plan, chosen)] if len(plan.amounts) > 1 else [],
        tables=[table, *filter(None, others)],
    )


def _chosen(plan: Plan, amount: float | None) -> int:
    """The number of the amount that the page marks."""
    amounts = [planned.amount for planned in plan.amounts]
    if amount is None:
        return len(amounts) // 2
    for number, planned in enumerate(amounts):
        if is_amount(planned, amount):
            return number
    known = listed(list(map(amount_text, amounts)), _MOST_COLUMNS)
    raise InvalidSpec(f"amount: {shown(amount)} was not planned; choose one of {known}")


def _totals(plan: Plan, planned: PlannedAmount) -> list[Total]:
    at = f"at amount {amount_text(planned.amount)}"
    return [
        Total("parameters", count(planned.total)),
        Total("pruned", count(planned.pruned), at),
        Total("sparsity", share(planned.pruned, planned.total), at),
        Total("norm removed", f"{planned.norm_removed:.2%}", at),
        Total("bytes of kept values", size(planned.kept_bytes), at),
        Total("bytes of a dense file", size(plan.dense_bytes), "the same at every amount"),
    ]


def _curve(plan: Plan, chosen: int) -> dict[str, object]:
    points = [
        {
            "amount": amount_text(planned.amount),
            "sparsity": planned.sparsity,
            "norm": finite(planned.norm_removed),
            "chosen": number == chosen,
        }
        for number, planned in enumerate(plan.amounts)
    ]
    points.sort(key=lambda point: float(str(point["sparsity"])))
    return {"kind": "curve", "title": "What each amount removes", "points": points}


def _amounts(plan: Plan) -> Table | None:
    """What the curve shows, in numbers."""
    rows = [(of.sparsity, finite(of.norm_removed), of.pruned, of.kept_bytes) for of in plan.amounts]
    names = [amount_text(planned.amount) for planned in plan.amounts]
    return Table("Amounts", "amount", _AMOUNTS, names, [Frame("", rows)])


def _tensors(plan: Plan, chosen: int) -> Table:
    frames = [
        Frame(
            amount_text(planned.amount),
            [
                (of.sparsity, finite(of.norm_removed), of.pruned, of.total)
                for of in planned.tensors.values()
            ],
        )
        for planned in plan.amounts
    ]
    names = list(plan.amounts[0].tensors)
    return Table("Tensors", "tensor", _TENSORS, names, frames, chosen, is_grouped=True)


def sensitivity_page(sensitivity: Sensitivity, title: str) -> Page:
    """Makes the page of a sensitivity: a heat map."""
    numbers = _spread(len(sensitivity.amounts), _MOST_COLUMNS)
    columns = [Column(amount_text(sensitivity.amounts[n]), "heat") for n in numbers]
    rows = [[finite(shares[n]) for n in numbers] for shares in sensitivity.norm_removed.values()]
    names = list(sensitivity.norm_removed)
    note = (
        "A row is a tensor, pruned alone; a column is an amount, and a cell is the share of the "
        "tensor's norm that it removes. The colour follows the square root of the share."
    )
    table = Table(
        "Heat map", "tensor", columns, names, [Frame("", rows)], is_grouped=True, note=note
    )
    return Page(
        title=title,
        subtitle=f"By {sensitivity.method}.",
        totals=[Total("tensors", count(len(names))), *_extremes(sensitivity)],
        notes=[f"Shown are {len(numbers)} of {len(sensitivity.amounts)} amounts."]
        if len(numbers) < len(sensitivity.amounts)
        else [],
        charts=_lines(sensitivity) if len(numbers) > 1 and names else [],
        tables=[table],
    )


def _spread(length: int, most: int) -> list[int]:
    """At most so many numbers in range(length), evenly, the first and the last among them."""
    if length <= most:
        return list(range(length))
    return [round(n * (length - 1) / (most - 1)) for n in range(most)]


def _by_loss(sensitivity: Sensitivity) -> list[str]:
    """Names, the tensor that loses most first."""
    return sorted(sensitivity.norm_removed, key=lambda name: -sum(sensitivity.norm_removed[name]))


def _extremes(sensitivity: Sensitivity) -> list[Total]:
    names = _by_loss(sensitivity)
    if not names:
        return []
    return [Total("most sensitive", names[0]), Total("least sensitive", names[-1])]


def _lines(sensitivity: Sensitivity) -> Sequence[dict[str, object]]:
    names = _by_loss(sensitivity)
    most = names[:_LINES]
    least = [name for name in names[-_LINES:] if name not in most]
    groups = [("most sensitive", most), ("least sensitive", least)]
    lines = [
        {
            "name": name,
            "group": group,
            "shares": [
                [amount, finite(part)]
                for amount, part in zip(
                    sensitivity.amounts, sensitivity.norm_removed[name], strict=True
                )
            ],
        }
        for group, those in groups
        for name in those
    ]
    counts = f"{len(most)} most and {len(least)} least sensitive tensors"
    note = f"The share of its norm that each of the {counts} loses."
    return [{"kind": "lines", "title": "Extremes", "lines": lines, "note": note}]
