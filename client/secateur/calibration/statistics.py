"""Statistics of the inputs of a model's layers: a value that can be added, saved and loaded."""

import os
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from secateur.calibration.layer import LayerStatistics, added, check_addable
from secateur.calibration.triangle import Triangle
from secateur.calibration.unit_statistics import UnitStatistics, merged
from secateur.display.notebook import Displayed
from secateur.errors import InvalidStatistics
from secateur.tables import Table, text_table


class Statistics(Displayed, Mapping[str, LayerStatistics]):
    """The statistics of the inputs of weights, by the weights' names. It cannot be changed.

    `a + b` are the statistics of both runs. Print it for a table.

    Attributes:
        blocks: From the name of each list of layers, such as "model.layers", to the influence of
            each layer: 1 - the cosine of a token before and after it.
        experts: From the name of each module of experts, such as "model.layers.0.mlp.experts", to
            the norm of each expert's outputs times their weights.

    Args:
        layers: From the name of each weight, as in the model's state_dict, to its statistics.
        blocks: See above.
        experts: See above.
    """

    def __init__(
        self,
        layers: Mapping[str, LayerStatistics],
        blocks: Mapping[str, UnitStatistics] | None = None,
        experts: Mapping[str, UnitStatistics] | None = None,
    ) -> None:
        self._layers = MappingProxyType(dict(layers))
        self.blocks = MappingProxyType(dict(blocks or {}))
        self.experts = MappingProxyType(dict(experts or {}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Statistics":
        """Reads a file that `save`, or another program, has written.

        Grams stay in the file until they are used. So do not write into the file; to replace it
        is allowed.

        Args:
            path: A safetensors file with the layout of docs/statistics.md.

        Raises:
            InvalidStatistics: It cannot be read, or is damaged.
        """
        from secateur.calibration.files import read_statistics

        return cls(*read_statistics(path))

    @classmethod
    def from_imatrix(
        cls,
        path: str | os.PathLike[str],
        names: Mapping[str, str | None] | Callable[[str], str | None] | None = None,
    ) -> "Statistics":
        """Reads an importance matrix of llama.cpp: of GGUF, which needs secateur[gguf], or older.

        It has `sum_squares` and `count`; newer ones have `sum` too. The count of an older one is
        that of chunks of text, and not of tokens.

        Args:
            path: A file that llama-imatrix has written.
            names: From the names of GGUF, such as "blk.0.attn_q.weight", to those of the model; a
                mapping or a function. None as a name leaves a tensor out, and "{expert}" in it
                stands for the number of an expert. Names that a mapping lacks, and all by default,
                become those of Llama, Mistral, Qwen2, Qwen3 and their experts, Gemma 2 and 3, and
                Phi-3.

        Raises:
            InvalidStatistics: It cannot be read, is damaged, or has names that are unknown.
            InvalidSpec: `names` is neither a mapping nor a function, or returns no name.
            SecateurError: The package gguf is needed, and is not installed.

        Warns:
            NotCalibrated: Some experts had no input. They are absent from the result.
        """
        from secateur.calibration.imatrix import read_imatrix

        return cls(read_imatrix(path, names))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file, whole or not at all: see docs/statistics.md.

        Raises:
            SecateurError: It cannot be written.
        """
        from secateur.calibration.files import write_statistics

        write_statistics(path, self)

    def triangle(self, name: str) -> Triangle:
        """Returns the upper triangle of a layer's gram, for a method that needs it.

        Args:
            name: Of a weight.

        Raises:
            InvalidStatistics: The weight has no statistics, or no gram.
        """
        if name not in self:
            raise InvalidStatistics(f"{name}: the statistics have no such layer")
        triangle = self[name].triangle
        if triangle is None:
            raise InvalidStatistics(
                f"{name}: the statistics have no gram of this layer; calibrate with gram=True; "
                "embeddings, and convolutions that are grouped or transposed, never have one"
            )
        return triangle

    def gram_owners(self) -> dict[str, str]:
        """Returns, for each layer with a gram, the first layer that has the same one."""
        owners: dict[int, str] = {}
        return {
            name: owners.setdefault(id(layer.triangle), name)
            for name, layer in self.items()
            if layer.triangle is not None
        }

    def __getitem__(self, name: str) -> LayerStatistics:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Statistics):
            return NotImplemented
        return self._parts() == other._parts()

    __hash__ = None  # type: ignore[assignment]

    def __add__(self, other: "Statistics") -> "Statistics":
        if not isinstance(other, Statistics):
            return NotImplemented
        sum_of = _shared_sums()
        layers = dict(self)
        for name, layer in other.items():
            if name in self:
                check_addable(name, self[name], layer)
                triangle = sum_of(self[name].triangle, layer.triangle)
                layers[name] = added(self[name], layer, triangle)
            else:
                layers[name] = layer
        blocks, experts = merged(self.blocks, other.blocks), merged(self.experts, other.experts)
        return Statistics(layers, blocks, experts)

    def __repr__(self) -> str:
        grams = len(set(self.gram_owners().values()))
        counts = {"grams": grams, "stacks": len(self.blocks), "mixtures": len(self.experts)}
        others = (f", {count} {what}" for what, count in counts.items() if count)
        return f"Statistics({len(self)} layers{''.join(others)})"

    def table(self) -> Table:
        """Returns a row for each layer, list of layers and module of experts."""
        rows = [("layer", "statistics")]
        rows += [(name, ", ".join(layer.described())) for name, layer in self.items()]
        rows += [(name, of.described()) for name, of in {**self.blocks, **self.experts}.items()]
        return Table(rows, left=2)

    def __str__(self) -> str:
        _, *rows = self.table().rows
        return text_table(rows, left=2) if rows else repr(self)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies the layers: a MappingProxyType cannot be pickled."""
        return Statistics, self._parts()

    def _parts(self) -> tuple[dict[str, Any], ...]:
        return dict(self), dict(self.blocks), dict(self.experts)


def _shared_sums() -> Callable[[Triangle | None, Triangle | None], Triangle | None]:
    """Returns a function that adds grams: two layers that share both of them share the sum."""
    sums: dict[tuple[int, int], Triangle] = {}

    def sum_of(one: Triangle | None, other: Triangle | None) -> Triangle | None:
        if one is None or other is None:
            return None
        key = id(one), id(other)
        if key not in sums:
            sums[key] = one + other
        return sums[key]

    return sum_of
