"""How a model is split into messages, for clients in any language."""

from collections.abc import Iterator

import grpc
import numpy as np
import pytest
import torch

from secateur_proto import pruner_pb2, pruner_pb2_grpc, report_pb2, spec_pb2
from secateur_proto.framing import CHUNK_BYTES, cut, file_header

SPEC = spec_pb2.PruningSpec(
    rules=[
        spec_pb2.Rule(
            selection=spec_pb2.Selection(
                tensors=["w"],
                magnitude=spec_pb2.Magnitude(),
                granularity=spec_pb2.GRANULARITY_ELEMENT,
                scope=spec_pb2.SCOPE_GLOBAL,
                fraction=0.5,
            )
        )
    ]
)


def answer(
    channel: grpc.Channel,
    weights: np.ndarray[tuple[int], np.dtype[np.float32]],
    output: pruner_pb2.Output.ValueType,
) -> list[pruner_pb2.PruneResponse]:
    """Sends weights in the fewest messages. Returns the messages of the answer."""
    header = file_header([("w", "F32", weights.shape)])
    pieces = cut([header, weights.view(np.uint8).data])
    head = pruner_pb2.PruneHeader(data_bytes=len(header) + weights.nbytes, spec=SPEC, output=output)

    def messages() -> Iterator[pruner_pb2.PruneRequest]:
        yield pruner_pb2.PruneRequest(header=head, data=bytes(next(pieces)))
        yield from (pruner_pb2.PruneRequest(data=bytes(piece)) for piece in pieces)

    return list(pruner_pb2_grpc.PrunerStub(channel).Prune(messages(), timeout=300))


@pytest.mark.parametrize(
    "output",
    [
        pruner_pb2.OUTPUT_UNSPECIFIED,
        pruner_pb2.OUTPUT_MASKS,
        pruner_pb2.OUTPUT_DENSE,
        pruner_pb2.OUTPUT_NONE,
    ],
)
def test_a_small_model_is_one_message_each_way(
    channel: grpc.Channel, output: pruner_pb2.Output.ValueType
) -> None:
    messages = answer(channel, np.arange(1000, dtype=np.float32), output)
    assert len(messages) == 1
    assert messages[0].HasField("result")
    assert messages[0].result.data_bytes == len(messages[0].data)
    assert (len(messages[0].data) == 0) == (output == pruner_pb2.OUTPUT_NONE)


def test_a_large_answer_is_its_report_and_then_chunks(channel: grpc.Channel) -> None:
    weights = np.arange(1, 1_000_001, dtype=np.float32)
    messages = answer(channel, weights, pruner_pb2.OUTPUT_DENSE)
    assert [message.HasField("result") for message in messages] == [True, False, False, False]
    assert [len(message.data) for message in messages[:-1]] == [CHUNK_BYTES] * 3
    file = b"".join(message.data for message in messages)
    assert len(file) == messages[0].result.data_bytes
    kept = np.where(weights > 500_000, weights, 0)
    assert (np.frombuffer(file[-weights.nbytes :], np.float32) == kept).all()


@pytest.mark.parametrize("count", [100, 1_000_000])
@pytest.mark.parametrize("output", [pruner_pb2.OUTPUT_MASKS, pruner_pb2.OUTPUT_DENSE])
def test_a_call_with_the_metadata_is_one_message_each_way(
    channel: grpc.Channel, count: int, output: pruner_pb2.Output.ValueType
) -> None:
    weights = np.arange(1, count + 1, dtype=np.float32)
    streamed = answer(channel, weights, output)
    header = file_header([("w", "F32", weights.shape)])
    data = header + weights.tobytes()
    head = pruner_pb2.PruneHeader(data_bytes=len(data), spec=SPEC, output=output)
    call = channel.unary_unary(
        "/secateur.v1.Pruner/Prune",
        pruner_pb2.PruneRequest.SerializeToString,
        pruner_pb2.PruneResponse.FromString,
    )
    request = pruner_pb2.PruneRequest(header=head, data=data)
    single = call(request, timeout=300, metadata=(("secateur-single", "1"),))
    assert single.result == streamed[0].result
    assert single.data == b"".join(message.data for message in streamed)


def test_a_report_has_its_coverage_and_its_warnings(channel: grpc.Channel) -> None:
    """Half of a tensor of zeros is pruned, and another tensor has no rule."""
    header = file_header([("w", "F32", (2, 4)), ("b", "F32", (3,))])
    data = header + bytes(4 * 11)
    head = pruner_pb2.PruneHeader(data_bytes=len(data), spec=SPEC, output=pruner_pb2.OUTPUT_NONE)

    def report(prior: pruner_pb2.Prior.ValueType) -> report_pb2.SparsityReport:
        head.prior = prior
        request = pruner_pb2.PruneRequest(header=head, data=data)
        (message,) = pruner_pb2_grpc.PrunerStub(channel).Prune(iter([request]), timeout=20)
        return message.result.report

    found = report(pruner_pb2.PRIOR_UNSPECIFIED)
    assert found.coverage == report_pb2.Coverage(
        covered=8, uncovered=3, uncovered_tensors=1, largest_uncovered=["b"]
    )
    zeros, note = found.warnings
    assert (zeros.code, zeros.severity) == ("ZERO_BEFORE", report_pb2.SEVERITY_WARNING)
    assert zeros.tensors == ["w"]
    assert "PRIOR_ZEROS" in zeros.message
    assert (note.code, note.severity) == ("NOT_SMALLER", report_pb2.SEVERITY_NOTE)
    assert not report(pruner_pb2.PRIOR_ZEROS).warnings


def test_a_mask_is_bits_lowest_first(channel: grpc.Channel) -> None:
    """The 1st, 2nd, 5th, 9th and 10th of ten elements are the smallest."""
    weights = np.array([1, 2, 9, 8, 3, 7, 6, 5.5, 4, 0], np.float32)
    (message,) = answer(channel, weights, pruner_pb2.OUTPUT_MASKS)
    assert message.data == (
        (56).to_bytes(8, "little")
        + b'{"w":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}'.ljust(56)
        + bytes([0b11101100, 0b00000000])
    )


@pytest.mark.slow
def test_a_model_of_more_than_2_gib_is_pruned(channel: grpc.Channel) -> None:
    """The request has 5 GB; the lower half of the magnitudes is pruned."""
    import secateur
    from tests.conftest import start_command, stop_server

    count = 1_250_000_000
    server = start_command("--max-model-bytes", "6GiB")
    try:
        weights = torch.arange(count, dtype=torch.float32)
        with secateur.Client(server.address, timeout=600) as client:
            result = client.prune({"w": weights}, secateur.global_unstructured("w", 0.5))
        # float32 has only 24 bits: neighbours tie, and the lower index is pruned first.
        assert result.report.zeros == result.report.rules[0][0].pruned == count // 2
        mask = result.masks["w"]
        assert not mask[: count // 2].any()
        assert mask[count // 2 :].all()
    finally:
        stop_server(server)


@pytest.mark.slow
def test_a_tensor_of_more_than_2_to_the_31_elements_is_pruned() -> None:
    """float16 has few values, so there are ties beyond index 2^31."""
    import secateur
    from tests.conftest import start_command, stop_server

    count = (1 << 31) + 1_000_003
    server = start_command("--max-model-bytes", "6GiB")
    try:
        weights = np.full(count, 2.0, np.float16)
        weights[5::7] = -1.0
        ones = (count - 5 + 6) // 7
        count_pruned = ones + (1 << 31) * 6 // 7 + 300_000  # the last is above index 2^31
        with secateur.Client(server.address, timeout=900) as client:
            spec = secateur.global_unstructured("w", count_pruned)
            result = client.prune({"w": weights}, spec, progress=False)
        choice = result.report.rules[0][0]
        assert (choice.pruned, choice.threshold) == (count_pruned, 2.0)
        assert (choice.ties, choice.ties_pruned) == (count - ones, count_pruned - ones)
        kept = result.masks["w"]
        assert not kept[5::7].any()
        pruned = weights == 2.0
        pruned &= ~kept
        last = count - 1 - int(np.argmax(pruned[::-1]))
        # The first elements of 2.0 are pruned: no kept one precedes the last of them.
        assert last > 1 << 31
        assert int(np.count_nonzero(pruned)) == count_pruned - ones
        assert not kept[: last + 1].any()
    finally:
        stop_server(server)
