"""What methods cost: over the wire, in the core alone, and beside the fastest public way.

All prune half of the same fp32 parameters, but 2:4 of all groups. `wire` is what a caller waits
for: client.prune(...).masks against a secateur-server in a process of its own. `core` is the
pruning of tensors that are in this process, without what a first look at arriving data tells.
`public` is in this process, too, with torch's own threads. The bound is the fewest passes over the
weights that could do, each as fast as torch sums them, at best, in the same run.
"""

import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

import public
import secateur
from bounds import raw_upload
from common import AMOUNT, Model, Server, in_fresh_process, make_model, running_server, timed
from secateur_server.backends.cores import one_thread
from secateur_server.cut.prune import prune
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.decode import decode_spec
from secateur_server.spec.resolve import resolve
from secateur_server.spec.rules import Rule
from secateur_server.state_dict.catalog import Stored, read_catalog
from secateur_server.state_dict.parameter import Parameter

CALLS, READINGS = 3, 15
# Of the mask's bits: public ways rank by float32's roundings, and a swap of two rows is 4e-4.
MOST_DIFFERING = 1e-3

Seconds = list[float]


@dataclass(frozen=True)
class Case:
    """A method.

    passes: the fewest over the weights: those of one rank need a threshold before they are marked;
    None where it takes a sort.  public: another way to the same masks.
    """

    name: str
    spec: secateur.Spec
    passes: int | None
    public: Callable[[Model], Model] | None = None


def elements() -> list[Case]:
    """What prunes elements."""
    rails = secateur.guard_rails(min_sparsity=0.4, max_sparsity=0.55)
    whole: dict[str, Any] = {"tensors": "*", "amount": AMOUNT, "scope": "global"}
    return [
        Case("each tensor", secateur.select("*", AMOUNT), 2, public.uniform),
        Case("global", secateur.select(**whole), 2, public.by_magnitude),
        Case("uniform", secateur.select(**whole, allocation="uniform"), 2, public.uniform),
        Case("ERK", secateur.erk("*", AMOUNT), 2, public.erk),
        Case("LAMP", secateur.lamp("*", AMOUNT), None, public.lamp),
        Case("global, 40 to 55 % of each", secateur.select(**whole, guard_rails=rails), 2),
        Case("global, by mean", secateur.select(**whole, normalization="mean"), 2),
    ]


def structures(model: Model) -> list[Case]:
    """What prunes larger units."""
    half = secateur.select("*", AMOUNT, granularity=secateur.n_m(2, 4), scope="global")
    group = secateur.group("rows", *(secateur.member(name) for name in model))
    return [
        Case("2:4", secateur.n_m_structured("*"), 1, public.two_of_four),
        Case("2:4, half of the groups, global", half, 2),
        Case("blocks of 4x4", secateur.block_structured("*", AMOUNT, 4, 4, 2), 1, public.blocks),
        Case("blocks of 1x16", secateur.block_structured("*", AMOUNT, 1, 16, 2), 1),
        Case("rows", secateur.ln_structured("*", AMOUNT, 2, 0), 1, public.rows),
        Case("rows, global", secateur.global_structured("*", AMOUNT, 2, 0), 1),
        Case("rows of all as groups", secateur.grouped([group], AMOUNT, p=2), 1),
    ]


class Core:
    """The server's pruning without the server, on a thread that is set up as the server's are."""

    def __init__(self, model: Model) -> None:
        self._parameters = {name: Parameter(weight) for name, weight in model.items()}
        stored = {name: Stored("F32", w.dtype, tuple(w.shape)) for name, w in model.items()}
        self._catalog = read_catalog(stored, {})
        self._thread = ThreadPoolExecutor(1, "core", one_thread)

    def rules(self, spec: secateur.Spec) -> list[Rule]:
        """The spec's rules as the server has them."""
        message, _ = spec.encode(self._parameters)
        return resolve(RequestContext(), decode_spec(RequestContext(), message), self._catalog)

    def seconds(self, work: Callable[..., Any], *arguments: Any) -> float:
        """What `work` takes with the parameters, and no scores, behind other arguments."""
        call = self._thread.submit(timed, lambda: work(*arguments, self._parameters, {}))
        return call.result()[0]

    def prune(self, spec: secateur.Spec) -> float:
        """The seconds of a prune."""
        rules = self.rules(spec)
        return self.seconds(
            lambda parameters, extras: prune(RequestContext(), parameters, rules, extras)
        )


def compare(largest: int) -> list[dict[str, Any]]:
    """Measures all.  largest: millions of parameters."""
    found = []
    with running_server() as server:
        for millions in (10, 100):
            if millions <= largest:
                found += in_fresh_process(measure_all, server, millions)
    return found


def measure_all(server: Server, millions: int) -> list[dict[str, Any]]:
    """The figures of each method at one size."""
    model = make_model(millions)
    core, reading = Core(model), min(reading_pass(model) for _ in range(READINGS))
    as_bytes = np.ones(millions * 4_000_000, np.uint8).data
    with secateur.Client(server.address) as client, raw_upload() as upload:
        return [
            {"case": case.name, "parameters": millions * 1_000_000, "reading": reading}
            | measure(client, core, model, case, lambda: upload(as_bytes))
            for case in [*elements(), *structures(model)]
        ]


def reading_pass(model: Model) -> float:
    """The seconds of a pass over the weights that does next to nothing with them."""
    return timed(lambda: [weight.sum() for weight in model.values()])[0]


def measure(
    client: secateur.Client, core: Core, model: Model, case: Case, upload: Callable[[], float]
) -> dict[str, Any]:
    """The median seconds of a method's ways, which take turns.

    Fails where the masks of a public way differ in more than roundings explain.
    """
    ways: dict[str, Callable[[], float]] = {
        "wire": lambda: timed(lambda: masks_of(client, model, case))[0],
        "core": lambda: core.prune(case.spec),
        "raw upload": upload,
    }
    if (public_way := case.public) is not None:
        ways["public"] = lambda: timed(lambda: public_way(model))[0]
    for way in ("wire", "core"):  # kernels compiled, memory touched
        ways[way]()
    rounds = [{name: way() for name, way in ways.items()} for _ in range(CALLS)]
    medians = {name: statistics.median(of[name] for of in rounds) for name in ways}
    return medians | {"passes": case.passes, "differing": differing(client, model, case)}


def masks_of(client: secateur.Client, model: Model, case: Case) -> Model:
    """What a caller waits for."""
    masks: Model = client.prune(model, case.spec, progress=False).masks
    return masks


def differing(client: secateur.Client, model: Model, case: Case) -> float | None:
    """The share of mask bits in which a public way differs; None where there is no such way."""
    if case.public is None:
        return None
    ours, theirs = masks_of(client, model, case), case.public(model)
    bits = sum(int((theirs[name] != mask).count_nonzero()) for name, mask in ours.items())
    share = bits / sum(mask.numel() for mask in ours.values())
    assert share <= MOST_DIFFERING, f"{case.name}: {share:.2%} of the mask differ"
    return share


COLUMNS = (
    *("half of", "method", "wire", "ns an element", "to raw", "core", "bound", "core to bound"),
    *("public", "public to core", "public to wire"),
)


def rows(found: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The lines of the table."""
    return [row(case) for case in found]


def row(case: dict[str, Any]) -> tuple[str, ...]:
    """One line.  Without a bound, or a public way, cells stay empty."""
    wire, core, public_way = case["wire"], case["core"], case.get("public")
    bound = None if case["passes"] is None else case["passes"] * case["reading"]
    return (
        f"{case['parameters'] // 1_000_000} M",
        case["case"],
        f"{wire:.3f} s",
        f"{wire / case['parameters'] * 1e9:.2f}",
        f"{wire / case['raw upload']:.1f}",
        f"{core:.3f} s",
        *(("", "") if bound is None else (f"{bound:.3f} s", f"{core / bound:.1f}")),
        *(("", "", "") if public_way is None else beside(public_way, core, wire)),
    )


def beside(public_way: float, core: float, wire: float) -> tuple[str, ...]:
    """The cells of a public way: its seconds, and how many times ours they are."""
    return f"{public_way:.3f} s", f"{public_way / core:.1f}", f"{public_way / wire:.1f}"
