"""A transformer: its architecture, its config, and the names of its tensors."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.architectures.layout import Architecture, Config, HasBias, Kind, Layout, Mlp
from secateur.architectures.tables import ARCHITECTURES
from secateur.checks import integer, integers, shown
from secateur.errors import InvalidSpec
from secateur.paths import source_path

CONFIG = "config.json"
_END = 1 << 24  # of sizes: no model has more layers, channels or tokens

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True)
class Transformer:
    """A transformer.

    Attributes:
        architecture: Its entry in the table.
        config: The config of the transformer itself; of a model with images, that of its text.
        layout: The names of its layers' tensors.
        prefix: Of the model without a head: "bert.", or empty.
        shapes: Of its tensors by name; None if only the config is known.
    """

    architecture: Architecture
    config: Config
    layout: Layout
    prefix: str
    shapes: Shapes | None

    @property
    def layers(self) -> int:
        """The number of layers."""
        return self.size(self.architecture.keys.layers)

    @property
    def heads(self) -> int:
        """Query heads of a layer."""
        return self.size(self.architecture.keys.heads)

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values of a layer."""
        key = self.architecture.keys.kv_heads
        if key is None or self._value(key) is None:
            return self.heads
        return self.size(key)

    @property
    def head_dim(self) -> int:
        """The width of a head."""
        if self.architecture.has_head_dim and self._value("head_dim") is not None:
            return self.size("head_dim")
        return self.size(self.architecture.keys.hidden) // self.heads

    @property
    def experts(self) -> int:
        """Experts of a layer that has experts."""
        return self.size(self.experts_key)

    @property
    def experts_key(self) -> str:
        """The key of the config that has the number of experts."""
        keys = self.architecture.keys.experts
        return next((key for key in keys if self.config.get(key) is not None), keys[0])

    @property
    def intermediate(self) -> int:
        """Channels of a feed-forward network outside of experts."""
        key = self.architecture.keys.intermediate
        if key == "n_inner" and self.config.get(key) is None:  # as transformers computes it
            return 4 * self.size(self.architecture.keys.hidden)
        return self.size(key)

    @property
    def expert_intermediate(self) -> int:
        """Channels of an expert."""
        return self.size(self.architecture.keys.expert_intermediate)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the layers' matrices for one token, by the shapes.

        Of a mixture those of the experts that a token uses. Attention between tokens and the tables
        of tokens do not count.
        """
        stack = f"{self.prefix}{self.layout.stack}."
        dense = expert = 0
        for name, shape in (self.shapes or {}).items():
            if name.startswith(stack) and len(shape) > 1:
                if self._is_of_expert(name.removeprefix(stack).partition(".")[2]):
                    expert += math.prod(shape)
                else:
                    dense += math.prod(shape)
        if expert:
            expert = expert * self.size("num_experts_per_tok") // self.experts
        return dense + expert

    def _is_of_expert(self, name: str) -> bool:
        """Whether a name relative to a layer is that of a matrix of experts."""
        if self.layout.experts is None:
            return False
        mlp = self.layout.experts.mlp
        return any(name.startswith(part.partition("{}")[0]) for part in (*mlp.up, mlp.down))

    def size(self, key: str) -> int:
        """Returns a size that the config has.

        Raises:
            InvalidSpec: It is missing, or is not a size.
        """
        return integer(f"{CONFIG}: {key}", self._value(key), 1, _END)

    def _value(self, key: str) -> Any:
        value = self.config.get(key)
        return self.architecture.defaults.get(key) if value is None else value

    def layer(self, index: int) -> str:
        """Returns the name of a layer, with a dot at the end."""
        return f"{self.prefix}{self.layout.stack}.{index}."

    def stored_layers(self) -> int:
        """Counts the layers that have tensors."""
        stack = f"{self.prefix}{self.layout.stack}."
        names = (name for name in self.shapes or {} if name.startswith(stack))
        return len({name.removeprefix(stack).partition(".")[0] for name in names})

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has experts, and no feed-forward network of its own."""
        experts = self.layout.experts
        if experts is None or self.layout.mlp is None:
            return experts is not None
        if self.shapes is not None:
            return f"{self.layer(layer)}{experts.router}.weight" in self.shapes
        dense = integers(f"{CONFIG}: mlp_only_layers", self.config.get("mlp_only_layers") or ())
        return layer not in dense and (layer + 1) % self.size("decoder_sparse_step") == 0

    def networks(self, layer: int) -> Iterator[tuple[Mlp, bool]]:
        """Yields the feed-forward networks of a layer, and whether each is that of experts."""
        at, experts = self.layer(layer), self.layout.experts
        if not self.has_experts(layer):
            assert self.layout.mlp is not None, "has_experts looked at it"
            yield self.layout.mlp.named(at), False
            return
        assert experts is not None, "has_experts looked at it"
        for number in range(1 if experts.is_stacked else self.experts):
            yield experts.mlp.named(at, number), True

    def weight(self, name: str, kind: Kind) -> str:
        """Returns the name of a projection's weight.

        Raises:
            InvalidSpec: The model has no such tensor.
        """
        weight = name + kind.suffix
        if self.shapes is not None and weight not in self.shapes:
            raise InvalidSpec(
                f"{weight}: the model has no tensor of this name, which {CONFIG} demands; is it "
                "the config of another model?"
            )
        return weight

    def bias(self, name: str, kind: Kind, has_bias: HasBias) -> str | None:
        """Returns the name of a projection's bias; None if it has none."""
        bias = f"{name}.bias"
        if not kind.has_bias:
            return None
        if self.shapes is not None:
            return bias if bias in self.shapes else None
        if isinstance(has_bias, tuple):
            has_bias = bool(self.config.get(*has_bias))
        return bias if has_bias else None


def read_config(config: Any) -> tuple[dict[str, Any], Path | None]:
    """Reads a config, given as a mapping or the path of a config.json or of its folder.

    Returns:
        The config, and the folder; None for a mapping.

    Raises:
        InvalidSpec: It cannot be read, or is not a config.
    """
    if isinstance(config, Mapping):
        return dict(config), None
    path = source_path(config, InvalidSpec)
    file = path / CONFIG if path.is_dir() else path
    try:
        return parse_config(file.read_text("utf-8")), file.parent
    except OSError as error:
        raise InvalidSpec(f"config: {file}: {error.strerror}") from None
    except ValueError as error:
        raise InvalidSpec(f"config: {file}: {error}") from None


def parse_config(text: str) -> dict[str, Any]:
    """Parses the text of a config.json.

    Raises:
        ValueError: It is not a JSON object.
    """
    parsed = json.loads(text)
    if not isinstance(parsed, dict):
        raise ValueError(f"is a JSON {type(parsed).__name__}, not an object")
    return parsed


def transformer_of(config: Config, shapes: Shapes | None) -> Transformer:
    """Finds the architecture of a model and the names of its tensors.

    Args:
        config: The whole config.
        shapes: Of the model's tensors by name; None if they are not known.

    Raises:
        InvalidSpec: The architecture is not in the table, or the names do not fit it.
    """
    kind = config.get("model_type")
    architecture = ARCHITECTURES.get(kind) if isinstance(kind, str) else None
    if architecture is None:
        raise InvalidSpec(
            f"{CONFIG}: model_type: {shown(kind)} is not a known architecture; known are "
            f"{', '.join(ARCHITECTURES)}; write other groups with secateur.group"
        )
    inner = config.get(architecture.inside) if architecture.inside else config
    if not isinstance(inner, Mapping):
        raise InvalidSpec(f"{CONFIG}: {architecture.inside}: {shown(inner)} is not an object")
    if shapes is None:
        return Transformer(
            architecture, inner, architecture.layouts[0], _default_prefix(config), None
        )
    layout, prefix = _found(architecture, shapes)
    return Transformer(architecture, inner, layout, prefix, shapes)


def _default_prefix(config: Config) -> str:
    """The prefix by the class of the model that was saved."""
    architecture = ARCHITECTURES[config["model_type"]]
    classes = config.get("architectures")
    if not isinstance(classes, Sequence) or not classes:
        raise InvalidSpec(
            f"{CONFIG}: architectures: {shown(classes)} is not a list of a class, so that the "
            "names of the tensors are not known; pass source=, the model"
        )
    return "" if classes[0] == architecture.bare else f"{architecture.base}."


def _found(architecture: Architecture, shapes: Shapes) -> tuple[Layout, str]:
    """The layout that fits the names of tensors, and the prefix before it."""
    fitting = [
        (layout, prefix) for layout in architecture.layouts for prefix in _prefixes(layout, shapes)
    ]
    if not fitting:
        layout = architecture.layouts[0]
        raise InvalidSpec(
            f"source: no tensor is named {_probe(layout)}, with or without a prefix, as in a "
            f"{architecture.bare or 'model'} of transformers; the first name is "
            f"{shown(next(iter(shapes), None))}"
        )
    prefixes = {prefix for _, prefix in fitting}
    if len(prefixes) > 1:
        raise InvalidSpec(f"source: holds several models, at {', '.join(sorted(prefixes))}")
    return next((f for f in fitting if _has_experts(*f, shapes)), fitting[0])


def _probe(layout: Layout) -> str:
    return f"{layout.stack}.0.{layout.o}{layout.kind.suffix}"


def _prefixes(layout: Layout, shapes: Shapes) -> list[str]:
    probe = _probe(layout)
    return [
        name.removesuffix(probe) for name in shapes if name == probe or name.endswith(f".{probe}")
    ]


def _has_experts(layout: Layout, prefix: str, shapes: Shapes) -> bool:
    """Whether the names are those of the experts of a layout."""
    if layout.experts is None:
        return True
    mlp = layout.experts.mlp
    down = mlp.down.format(0) + mlp.kind.suffix
    return any(name.startswith(prefix) and name.endswith(f".{down}") for name in shapes)
