"""What a table of an architecture says: the names of a layer's tensors, and the config's keys."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Kind:
    """How a projection is stored.

    Attributes:
        suffix: From the projection's name to that of its weight.
        output: The dimension of the weight with a slice for each output.
        input: The dimension of the weight with a slice for each input.
        has_bias: Whether it may have a bias.
    """

    suffix: str
    output: int
    input: int
    has_bias: bool = True


LINEAR = Kind(".weight", 0, 1)
CONV1D = Kind(".weight", 1, 0)
# The projections of all experts in one tensor, an expert for each slice of dimension 0.
STACKED = Kind("", 1, 2, has_bias=False)


@dataclass(frozen=True)
class Mlp:
    """A feed-forward network.

    Attributes:
        up: The projections whose outputs are the channels. A name that is here twice is a fused
            projection: the outputs of the first come first.
        down: The projection whose inputs are the channels.
        kind: How they are stored.
    """

    up: tuple[str, ...]
    down: str
    kind: Kind = LINEAR

    def named(self, at: str, expert: int = 0) -> "Mlp":
        """Returns the network with full names: of a layer's name, and an expert's number."""
        up = tuple(at + name.format(expert) for name in self.up)
        return Mlp(up, at + self.down.format(expert), self.kind)


@dataclass(frozen=True)
class Experts:
    """A mixture of experts.

    Attributes:
        router: A Linear with an output for each expert.
        mlp: The network of an expert. `{}` in its names stands for the expert's number.
    """

    router: str
    mlp: Mlp

    @property
    def is_stacked(self) -> bool:
        """Whether one tensor has all experts."""
        return self.mlp.kind is STACKED


@dataclass(frozen=True)
class Layout:
    """The names of the tensors of a layer, relative to it.

    Attributes:
        stack: The list of layers, relative to the model without a head.
        qkv: The projections of queries, keys and values. A name that is here several times is a
            fused projection.
        o: The projection whose inputs are the outputs of the heads.
        mlp: None if every layer has experts.
        experts: Those of some or all layers.
        kind: How the projections of the attention are stored.
    """

    stack: str
    qkv: tuple[str, str, str]
    o: str
    mlp: Mlp | None
    experts: Experts | None = None
    kind: Kind = LINEAR


# Whether a projection has a bias: yes, no, or a key of the config and its default.
HasBias = bool | tuple[str, bool]


@dataclass(frozen=True)
class Keys:
    """The keys of a config that the sizes of tensors decide."""

    hidden: str = "hidden_size"
    layers: str = "num_hidden_layers"
    heads: str = "num_attention_heads"
    kv_heads: str | None = "num_key_value_heads"
    intermediate: str = "intermediate_size"
    expert_intermediate: str = "moe_intermediate_size"
    experts: tuple[str, ...] = ("num_experts", "num_local_experts")


@dataclass(frozen=True)
class Architecture:
    """An architecture of transformers.

    Attributes:
        bare: The class of the model without a head, as the config's `architectures` names it.
        base: The name of that model within one with a head; empty if the names never have one.
        layouts: That of the files which save_pretrained writes, and that of state_dict() if it is
            another one.
        keys: The config's keys.
        defaults: What transformers takes for a key that the config lacks.
        attention_bias: Whether queries, keys and values have biases.
        mlp_bias: Whether the projections to channels have biases.
        inside: The key of the config that has the transformer's own config; None is the whole.
        embeddings: The table of tokens, relative to the model without a head.
        outputs: Projections to tokens, if the model has such a head, with their full names.
        has_head_dim: Whether its config has a `head_dim`. Without it, a head is as wide as hidden
            size / heads, and a model with fewer heads cannot be described.
        heads_divide_hidden: Whether the config must have a number of heads that divides the hidden
            size, whatever the width of a head.
        layer_types: Computes the list `layer_types` of a config that lacks it, by the number of
            layers; None if the architecture has no such list.
    """

    bare: str
    base: str
    layouts: tuple[Layout, ...]
    keys: Keys = Keys()
    defaults: Config = field(default_factory=dict)
    attention_bias: HasBias = False
    mlp_bias: HasBias = False
    inside: str | None = None
    embeddings: str = "embed_tokens"
    outputs: tuple[str, ...] = ("lm_head",)
    has_head_dim: bool = True
    heads_divide_hidden: bool = False
    layer_types: Callable[[Config, int], list[str]] | None = None
