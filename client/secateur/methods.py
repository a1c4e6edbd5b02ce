"""The methods that make specs: those of torch.nn.utils.prune, and others in their manner."""

from collections.abc import Sequence
from functools import reduce
from operator import add

from secateur.amounts import AnyAmount, pattern_of
from secateur.array_files import AnyArrays, arrays_of, files_of
from secateur.checks import one_of, patterns
from secateur.choices import Importance, activation, blocks, magnitude, norm, random, slices
from secateur.choices import n_m as n_m_of
from secateur.factors import AnyStatistics, calibrated_names
from secateur.literals import RankedBy
from secateur.selections import Names, grouped, select
from secateur.spec import MASKS, METHODS, Rule, Spec
from secateur_proto import spec_pb2 as pb

_ABSOLUTE = Importance({"magnitude": pb.Magnitude()})  # without p: every norm of an element is |w|


def identity(tensors: Names) -> Spec:
    """Prunes nothing, but gives tensors a mask: torch.nn.utils.prune.identity.

    Args:
        tensors: See `l1_unstructured`.
    """
    return l1_unstructured(tensors, 0)


def l1_unstructured(
    tensors: Names, amount: AnyAmount, importance_scores: AnyArrays | None = None
) -> Spec:
    """Prunes the elements with the lowest |w|: torch.nn.utils.prune.l1_unstructured.

    Args:
        tensors: A name, a glob, or a list of them; each tensor is pruned by itself.
        amount: An int is a number of elements, a float in [0, 1] the fraction of those that are
            still unpruned.
        importance_scores: Arrays of the tensors' shapes, by the tensors' names; their absolute
            values rank in place of the weights'. Or the path of a file of them: .safetensors, .pt
            or .npz.

    Raises:
        InvalidSpec: An argument cannot be sent.
    """
    return select(tensors, amount, _ABSOLUTE, importance_scores=importance_scores)


def random_unstructured(tensors: Names, amount: AnyAmount, seed: int = 0) -> Spec:
    """Prunes random elements of each tensor: torch.nn.utils.prune.random_unstructured.

    Args:
        tensors: See `l1_unstructured`.
        amount: See `l1_unstructured`.
        seed: In [0, 2^64). The same seed prunes the same elements on every machine.
    """
    return select(tensors, amount, random(seed))


def ln_structured(
    tensors: Names,
    amount: AnyAmount,
    n: float | str,
    dim: int,
    importance_scores: AnyArrays | None = None,
) -> Spec:
    """Prunes the slices with the lowest Ln norm of each tensor: torch.nn.utils.prune.ln_structured.

    Args:
        tensors: See `l1_unstructured`.
        amount: See `l1_unstructured`; of slices.
        n: A number, inf or -inf; "fro"; or "nuc" for tensors of 3 dimensions.
        dim: The dimension of the slices; negative counts from the end.
        importance_scores: See `l1_unstructured`.
    """
    return select(tensors, amount, norm("n", n), slices(dim), importance_scores=importance_scores)


def random_structured(tensors: Names, amount: AnyAmount, dim: int, seed: int = 0) -> Spec:
    """Prunes random slices of each tensor: torch.nn.utils.prune.random_structured.

    Args:
        tensors: See `l1_unstructured`.
        amount: See `ln_structured`.
        dim: See `ln_structured`.
        seed: See `random_unstructured`.
    """
    return select(tensors, amount, random(seed), slices(dim))


def global_unstructured(
    tensors: Names,
    amount: AnyAmount,
    importance: RankedBy = "l1",
    seed: int = 0,
    importance_scores: AnyArrays | None = None,
) -> Spec:
    """Prunes elements ranked over all tensors: torch.nn.utils.prune.global_unstructured.

    Args:
        tensors: See `l1_unstructured`.
        amount: See `l1_unstructured`; of all tensors.
        importance: "l1", or "random".
        seed: See `random_unstructured`.
        importance_scores: See `l1_unstructured`; not with "random".
    """
    ranks = {"l1": magnitude(), "random": random(seed)}
    by = one_of("importance", importance, ranks)
    return select(tensors, amount, by, scope="global", importance_scores=importance_scores)


def custom_from_mask(masks: AnyArrays) -> Spec:
    """Prunes by the caller's masks: torch.nn.utils.prune.custom_from_mask.

    Args:
        masks: Arrays of the tensors' shapes, by the tensors' names, where 0 is pruned and 1 is
            kept; or the path of a file of them: what result.save(path, "masks") wrote, or
            .safetensors, .pt or .npz.
    """
    files = files_of("masks", masks)
    arrays = {MASKS: arrays_of("masks", masks)}
    return Spec((Rule(pb.Rule(custom_masks=pb.CustomMasks()), arrays, files=files),))


def n_m_structured(tensors: Names, n: int = 2, m: int = 4, dim: int = 1) -> Spec:
    """Keeps n of each m elements: the N:M sparsity of sparse tensor cores.

    Args:
        tensors: See `l1_unstructured`.
        n: See `n_m`.
        m: See `n_m`.
        dim: See `n_m`.
    """
    return select(tensors, 1.0, granularity=n_m_of(n, m, dim))


def block_structured(tensors: Names, amount: AnyAmount, rows: int, cols: int, n: float = 1) -> Spec:
    """Prunes the blocks with the lowest Ln norm of each tensor.

    Args:
        tensors: See `l1_unstructured`.
        amount: See `l1_unstructured`; of blocks.
        rows: See `blocks`.
        cols: See `blocks`.
        n: See `ln_structured`.
    """
    return select(tensors, amount, magnitude(n), blocks(rows, cols))


def global_structured(tensors: Names, amount: AnyAmount, n: float, dim: int) -> Spec:
    """Prunes the slices with the lowest power mean of order n, ranked over all tensors.

    Args:
        tensors: See `l1_unstructured`.
        amount: See `ln_structured`; of all tensors.
        n: A number, inf or -inf.
        dim: See `ln_structured`.
    """
    return select(tensors, amount, magnitude(n), slices(dim), scope="global")


def lamp(tensors: Names, amount: AnyAmount) -> Spec:
    """Prunes elements by layer-adaptive magnitude over all tensors: Lee et al. 2021.

    Args:
        tensors: See `l1_unstructured`.
        amount: See `global_unstructured`.
    """
    return select(tensors, amount, scope="global", allocation="lamp")


def erk(tensors: Names, amount: AnyAmount) -> Spec:
    """Prunes elements by |w|, each tensor by its Erdos-Renyi-Kernel share: Evci et al. 2020.

    Args:
        tensors: See `l1_unstructured`.
        amount: See `global_unstructured`.
    """
    return select(tensors, amount, scope="global", allocation="erk")


def wanda(
    tensors: Names,
    amount: AnyAmount | None,
    statistics: AnyStatistics,
    n_m: Sequence[int] | None = None,
) -> Spec:
    """Prunes the weights with the lowest |w| * rms of their input, in each output row.

    Sun et al. 2023. Also for weights of shape [inputs, outputs], as the Conv1D of GPT-2 has them.

    Args:
        tensors: A name, a glob, or a list of them: weights that have statistics. Globs mean neither
            biases nor embeddings.
        amount: See `l1_unstructured`; of each row. None with `n_m`.
        statistics: What `calibrate` returns, or the path of a file of it.
        n_m: Keeps n of each m inputs, such as (2, 4), in place of an amount.
    """
    return _calibrated(tensors, amount, activation(statistics), n_m)


def ria(
    tensors: Names,
    amount: AnyAmount | None,
    statistics: AnyStatistics,
    n_m: Sequence[int] | None = None,
    power: float = 0.5,
) -> Spec:
    """Prunes as `wanda` does, by relative importance and activations: Zhang et al. 2024.

    In place of |w| counts its share of its row plus its share of its column.

    Args:
        tensors: See `wanda`.
        amount: See `wanda`.
        statistics: See `wanda`.
        n_m: See `wanda`.
        power: The exponent of the root mean square.
    """
    return _calibrated(tensors, amount, activation(statistics, 1, power, True), n_m)


def _calibrated(
    tensors: Names, amount: AnyAmount | None, by: Importance, n_m: Sequence[int] | None
) -> Spec:
    """Prunes an amount of each row, or N:M along the inputs."""
    pattern = pattern_of(amount, n_m)
    if pattern is None:
        assert amount is not None, "pattern_of refuses both None"
        return select(tensors, amount, by, scope="row")
    n, m = pattern
    factors = by.factors
    assert factors is not None, "activation has statistics"
    by_dim = factors.by_input_dim(calibrated_names(factors.statistics, patterns(tensors)))
    specs = [select(names, 1.0, by, n_m_of(n, m, dim)) for dim, names in by_dim.items()]
    return reduce(add, specs)


METHODS.update(
    (method.__name__, method)
    for method in (
        identity,
        l1_unstructured,
        random_unstructured,
        ln_structured,
        random_structured,
        global_unstructured,
        custom_from_mask,
        n_m_structured,
        block_structured,
        global_structured,
        lamp,
        erk,
        wanda,
        ria,
        select,
        grouped,
    )
)
