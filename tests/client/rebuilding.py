"""Rebuilds a module with smaller tensors."""

import copy

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


class Heads(nn.Module):
    """nn.MultiheadAttention on itself, with as many heads as its weights have rows for."""

    def __init__(self, attention: nn.MultiheadAttention, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.tensors, self.head_dim = tensors, attention.head_dim
        self.batch_first, self.in_proj_bias = True, None  # which nn.TransformerEncoderLayer reads

    def forward(self, x: Tensor, *_: Tensor, **options: object) -> tuple[Tensor, None]:
        qkv = F.linear(x, self.tensors["in_proj_weight"], self.tensors["in_proj_bias"])
        q, k, v = qkv.view(*x.shape[:2], 3, -1, self.head_dim).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return F.linear(y, self.tensors["out_proj.weight"], self.tensors["out_proj.bias"]), None


def rebuilt(module: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """Returns a copy of a module with smaller tensors, and the sizes that torch's layers need."""
    small = copy.deepcopy(module)
    for path, part in list(small.named_modules()):
        prefix = f"{path}." if path else ""
        own = {n: tensors[prefix + n] for n in part.state_dict() if prefix + n in tensors}
        if isinstance(part, nn.MultiheadAttention):
            parent, _, leaf = path.rpartition(".")
            setattr(small.get_submodule(parent), leaf, Heads(part, own))
            continue
        if isinstance(part, nn.modules.conv._ConvNd) and part.groups > 1:
            part.groups = part.groups * len(own["weight"]) // len(part.weight)
        for name, tensor in own.items():
            if name in part._parameters:
                setattr(part, name, nn.Parameter(tensor))
            elif name in part._buffers:
                setattr(part, name, tensor)
        if isinstance(part, nn.InstanceNorm2d):
            part.num_features = len(own["weight"])
        if isinstance(part, nn.RNNBase):
            part.hidden_size = own["weight_hh_l0"].shape[0] // GATES[part.mode]
            part.input_size = own["weight_ih_l0"].shape[1]
            part.proj_size = part.proj_size and own["weight_hr_l0"].shape[0]
        if isinstance(part, nn.RNNCellBase):
            part.hidden_size, part.input_size = own["weight_hh"].shape[1], own["weight_ih"].shape[1]
    return small


GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}
