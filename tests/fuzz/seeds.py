"""Valid inputs of the targets, from which a fuzzer starts, and words of their formats."""

import json
from collections.abc import Iterable

import safetensors.torch
import torch

from secateur_proto import checkpoint_pb2, checkpoints_pb2, pruner_pb2, spec_pb2
from secateur_proto.dtypes import DTYPES
from tests.contract.raw import entry, file, masks, spec


def _files() -> Iterable[bytes]:
    torch.manual_seed(0)
    pair = {"w_orig": torch.randn(2, 3), "w_mask": torch.ones(2, 3), "n": torch.arange(2)}
    for data in (
        safetensors.torch.save(pair, {"made": "here"}),
        safetensors.torch.save({"half": torch.randn(5).bfloat16(), "none": torch.empty(0, 3)}),
        file({"a": entry("F4", [2], 0, 1), "é\n../": entry("F8_E4M3", [3], 1, 4)}, bytes(4)),
        file({"odd": entry("U8", [1], 0, 1), "w": entry("F32", [2], 1, 9)}, bytes(9)),
        file({"w": entry("F32", [2**40, 0], 0, 0)}),
    ):
        text, body = data[8:].split(b"}}", 1)
        parted = b"\0\0\1" + text + b"}}\0" + body.lstrip(b" ")
        yield from (b"\0\0\0" + data, b"\7\0\0" + data, b"\0\7\0" + data, parted)


def _calls() -> Iterable[bytes]:
    good = checkpoint_pb2.File(filename="a.safetensors", size_bytes=3, blake3="0a" * 32)
    files = [checkpoints_pb2.UploadFile(file=good), checkpoints_pb2.UploadFile(file=good, offset=2)]
    upload = checkpoints_pb2.UploadHeader(files=files[1:])
    header = pruner_pb2.PruneHeader(data_bytes=9, spec=spec("*"), keep=True)
    report = pruner_pb2.ReportHeader(data_bytes=9, tensors=["w"])
    final = pruner_pb2.FinalizeHeader(checkpoint="checkpoints/" + "0" * 32, destination_uri="a://b")
    data = pruner_pb2.PruneRequest(data=bytes(200))
    firsts = (
        pruner_pb2.PruneRequest(header=header, data=b"abc"),
        checkpoints_pb2.UploadRequest(header=upload, data=b"abc"),
        pruner_pb2.ReportRequest(header=report),
        pruner_pb2.FinalizeRequest(header=final),
    )
    for kind, first in enumerate(firsts):
        raws = [message.SerializeToString() for message in (first, data, data)]
        yield bytes([kind]) + b"".join(len(raw).to_bytes(2, "little") + raw for raw in raws)


def _indices() -> Iterable[bytes]:
    weight_map = {"w": "a.safetensors", "v": "a.safetensors", "u": "b.safetensors"}
    table = {"metadata": {"total_size": 3}, "weight_map": weight_map}
    yield json.dumps(table).encode()
    weight_map["t"] = "a.safetensors"
    yield json.dumps(table | {"more": [1.5, None, "é"]}, ensure_ascii=False).encode("utf-16")
    yield json.dumps(table, indent=2).encode()


def _specs() -> Iterable[bytes]:
    slices = spec_pb2.GRANULARITY_SLICE
    nuclear = spec_pb2.Magnitude(matrix_norm=spec_pb2.MATRIX_NORM_NUCLEAR)
    for given in (
        spec("*"),
        spec("conv*", "fc", scope=spec_pb2.SCOPE_GLOBAL, count=3),
        spec("fc", granularity=slices, dim=1, magnitude=spec_pb2.Magnitude(p=-0.5), count=1),
        spec("conv.weight", granularity=slices, dim=-1, magnitude=nuclear),
        spec("[ch]*", random=spec_pb2.Random(seed=7)),
        spec("conv.weight", importance_scores={"conv.weight": "scores"}),
        spec("fc", importance_scores={"fc": "fc scores"}, granularity=slices, dim=0),
        masks(**{"conv.weight": "mask", "fc": "fc scores"}),
        *_beyond_torch(),
    ):
        yield pruner_pb2.PruneHeader(spec=given).SerializeToString()


def _beyond_torch() -> Iterable[spec_pb2.PruningSpec]:
    everywhere = spec_pb2.SCOPE_GLOBAL
    rails = spec_pb2.GuardRails(
        rails=[spec_pb2.Rail(tensors=["fc"], max_sparsity=0.5), spec_pb2.Rail(keep_at_least=1)],
        keep_first=True,
    )
    members = [spec_pb2.Member(tensor="conv.weight"), spec_pb2.Member(tensor="fc", units=2)]
    groups = [spec_pb2.Group(name="g", members=members)]
    n_m, block = spec_pb2.GRANULARITY_N_M, spec_pb2.GRANULARITY_BLOCK
    group = spec_pb2.GRANULARITY_GROUP
    yield spec("*", scope=everywhere, guard_rails=rails)
    yield spec("*", scope=everywhere, allocation=spec_pb2.ALLOCATION_LAMP)
    yield spec("*", scope=everywhere, allocation=spec_pb2.ALLOCATION_ERK, count=3)
    yield spec("*", scope=spec_pb2.SCOPE_ISOMORPHIC, normalization=4, of_all=True)
    yield spec("*", granularity=n_m, dim=-1, pattern=spec_pb2.Pattern(n=1, m=2), fraction=1.0)
    yield spec("fc", granularity=block, block=spec_pb2.Block(shape=[2, 2], as_matrix=True))
    yield spec(granularity=group, groups=groups, scope=everywhere)
    yield spec("fc", fraction=None, threshold=1.0)
    yield spec("*", scope=everywhere, fraction=None, bytes=20)


SEEDS = {"safetensors_file": _files, "messages": _calls, "index": _indices, "spec": _specs}

WORDS = (
    *('{"', '":', '",', "},", "[0,", "]}", "\\\\u0000", "\\\\ud800", "-0", "1e9", "NaN", "null"),
    *("dtype", "shape", "data_offsets", "__metadata__", "_orig", "_mask", "w", "t", "u"),
    *("weight_map", "metadata", "total_size", "a.safetensors", "b.safetensors", "../", "."),
    *("9223372036854775807", "18446744073709551615", "4611686018427387904"),
    *("conv.weight", "fc", "half", "empty", "steps", "packed", "scores", "mask", "fc scores"),
    *DTYPES,
)
