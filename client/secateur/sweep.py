"""A module's own metric at several sparsities."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from secateur.amounts import encode_amounts
from secateur.checkpoint import Checkpoint
from secateur.checks import shown
from secateur.client import Client
from secateur.display.frames import amount_column, frame_of
from secateur.display.notebook import Displayed
from secateur.display.plots import curves, new_axes
from secateur.encoding import fitted_spec, unmasked_members
from secateur.errors import CheckpointNotFound, InvalidSpec, SecateurError
from secateur.evaluation import uncompiled
from secateur.metrics import Metrics, check_same, named_metrics
from secateur.model import Source
from secateur.plan import Sensitivity, amount_text
from secateur.progress import Progress, show_progress
from secateur.report import Report
from secateur.result import PruneResult
from secateur.source import read_source
from secateur.spec import Spec
from secateur.tables import Table
from secateur.tensors import torch_for
from secateur_proto import plan_pb2
from secateur_proto import spec_pb2 as pb

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame


@dataclass(frozen=True)
class SweepRow:
    """One sparsity.

    Attributes:
        amount: As requested; None for the module as it was.
        zeros: Elements of the tensors that the spec names that are zero.
        total: All elements of these tensors.
        sparsity: zeros / total.
        metrics: What `evaluate` returned, by name; a number alone is "metric".
    """

    amount: float | None
    zeros: int
    total: int
    sparsity: float
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Sweep(Displayed):
    """A module's own metric at several sparsities. Print it for a table.

    Attributes:
        rows: The first is of the module as it was, the others of one amount each.
        sensitivity: How much of its norm each tensor that the spec names would lose, pruned alone
            by magnitude.
    """

    rows: tuple[SweepRow, ...]
    sensitivity: Sensitivity

    def to_dict(self) -> dict[str, Any]:
        """Returns the sweep as plain data, for JSON."""
        return asdict(self)

    def to_frame(self) -> "DataFrame":
        """Returns a row for each amount as a pandas.DataFrame, and a column for each metric.

        Raises:
            SecateurError: pandas is not installed.
        """
        columns = {
            "amount": amount_column([row.amount for row in self.rows]),
            "zeros": ("int64", [row.zeros for row in self.rows]),
            "total": ("int64", [row.total for row in self.rows]),
            "sparsity": ("float64", [row.sparsity for row in self.rows]),
        }
        metrics = {name: ("float64", values) for name, values in self._metrics().items()}
        return frame_of({**columns, **metrics})

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draws each metric against the sparsity.

        Args:
            ax: Axes of matplotlib; None makes a figure, with the sensitivity beside it.

        Returns:
            The axes of the metrics.

        Raises:
            SecateurError: matplotlib is not installed.
        """
        if ax is None:
            ax, beside = new_axes(2, len(self.sensitivity.norm_removed))
            self.sensitivity.plot(beside)
        return curves(ax, [row.sparsity for row in self.rows], self._metrics())

    def table(self) -> Table:
        """Returns a row for each amount; the sensitivity has a table of its own."""
        rows = [("amount", "zeros", "sparsity", *self.rows[0].metrics)]
        for row in self.rows:
            amount = "unpruned" if row is self.rows[0] else amount_text(row.amount)
            metrics = (f"{value:.6g}" for value in row.metrics.values())
            rows.append((amount, f"{row.zeros:,}", f"{row.sparsity:.2%}", *metrics))
        return Table(rows)

    def __str__(self) -> str:
        return f"{self.table()}\n\n{self.sensitivity}"

    def _repr_html_(self) -> str:
        return super()._repr_html_() + self.sensitivity._repr_html_()

    def _metrics(self) -> dict[str, list[float]]:
        return {name: [row.metrics[name] for row in self.rows] for name in self.rows[0].metrics}


def sweep(
    client: Client,
    module: Any,
    spec: Spec,
    amounts: Sequence[float],
    evaluate: Callable[[Any], Metrics],
    progress: Progress = None,
) -> Sweep:
    """Prunes a module by each of several amounts, and measures it by the caller's own metric.

    The weights are sent once. The module is pruned in place as torch.nn.utils.prune does, so it
    keeps its zeros if `evaluate` trains it. After each call it is as it was: its values, gradients,
    buffers, modes and hooks. That takes a copy of its values.

    Args:
        client: A Client.
        module: A torch.nn.Module, which may be pruned already.
        spec: What to prune.
        amounts: Ints and floats in place of the amount of the spec's last rule that has one.
        evaluate: Gets the module, and returns a number, or a mapping from names to numbers. It is
            called for the module as it is, and then for each amount.
        progress: See `Client`.

    Raises:
        InvalidSpec: An argument is wrong. With masks alone, which is all that most specs give,
            every amount is checked before `evaluate` is called.
        InvalidStateDict: `module` is not a torch.nn.Module, or cannot be pruned.
        SecateurError: `evaluate` returned something else than numbers.
    """
    torch_for("sweep")
    from secateur.in_place import check_module

    if not isinstance(client, Client):
        raise SecateurError(f"client: {shown(client)} is not a secateur.Client")
    if not callable(evaluate):
        raise SecateurError(f"evaluate: {shown(evaluate)} is not a function of the module")
    check_module(module)
    source = read_source(module)
    fitted, asked = fitted_spec(spec, source), encode_amounts(amounts)
    specs = [_with_amount(fitted, amount) for amount in asked]
    message, _ = fitted.encode(source.tensors)
    sent = source.sending(unmasked_members(message)).only_parameters()
    with (
        show_progress(progress, len(specs) + 1, "sweep", " amounts") as advance,
        _uploaded(client, sent) as checkpoint,
    ):
        results = _prune_all(client, checkpoint, specs)
        first = next(results)
        names = list(first.report.tensors)
        before = client.report(checkpoint, names, progress=False)
        sensitivity = client.sensitivity(checkpoint, names, progress=False)
        rows = [_row(None, before, _metrics_of(module, evaluate))]
        advance(1)
        for amount, result in zip(asked, chain([first], results), strict=True):
            install = partial(_install, module, source, result, bool(spec.solvers))
            metrics = _metrics_of(module, evaluate, install)
            check_same(rows[0].metrics, metrics)
            rows.append(_row(_value(amount), result.report, metrics))
            advance(1)
    return Sweep(tuple(rows), sensitivity)


def _value(amount: plan_pb2.Amount) -> float:
    value: float = getattr(amount, str(amount.WhichOneof("amount")))
    return value


def _row(amount: float | None, report: Report, metrics: Mapping[str, float]) -> SweepRow:
    return SweepRow(amount, report.zeros, report.total, report.sparsity, metrics)


def _with_amount(spec: Spec, amount: plan_pb2.Amount) -> Spec:
    """The spec with another amount in the last rule that has one."""
    rules = list(spec.rules)
    for index, rule in reversed(list(enumerate(rules))):
        message = pb.Rule()
        message.CopyFrom(rule.message)
        kind = message.WhichOneof("method")
        holder = getattr(message, kind) if kind in ("selection", "solver") else None
        if holder is not None and holder.WhichOneof("amount"):
            field = str(amount.WhichOneof("amount"))
            setattr(holder, field, _value(amount))
            rules[index] = replace(rule, message=message)
            return Spec(tuple(rules))
    raise InvalidSpec("spec: no rule has an amount that could be replaced; add a rule that has one")


@contextmanager
def _uploaded(client: Client, source: Source) -> Iterator[Checkpoint]:
    """A checkpoint that is deleted after the block."""
    checkpoint = client.upload(source, progress=False)
    try:
        yield checkpoint
    except BaseException:
        with suppress(SecateurError):  # the caller sees the first error
            client.delete(checkpoint)
        raise
    with suppress(CheckpointNotFound):  # evicted
        client.delete(checkpoint)


def _prune_all(
    client: Client, checkpoint: Checkpoint, specs: Sequence[Spec]
) -> Iterator[PruneResult]:
    """The result of each spec: weights one by one, and masks, which are small, all at first."""
    if specs[0].solvers:
        for spec in specs:
            yield client.prune(checkpoint, spec, "reparametrized", progress=False)
        return
    masks = deque(client.prune(checkpoint, spec, progress=False) for spec in specs)
    while masks:
        yield masks.popleft()


def _install(module: Any, source: Source, result: PruneResult, has_weights: bool) -> None:
    """Gives a module the masks of a result, and its weights if it has others."""
    from secateur.module import apply_masks, set_values

    if has_weights:
        set_values(module, result.state_dict("reparametrized"))
    apply_masks(module, result.masks, source.prunable_names())


def _metrics_of(
    module: Any, evaluate: Callable[[Any], Metrics], install: Callable[[], None] | None = None
) -> dict[str, float]:
    """What `evaluate` returns for a module, after `install` and before it is restored."""
    from secateur.in_place import left_as_it_was

    with left_as_it_was(module), uncompiled():
        if install:
            install()
        return named_metrics(evaluate(module))
