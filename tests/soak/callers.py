"""One process of callers of the soak test. Each of them makes one call after another.

The test runs this module in several processes, because Python's lock would limit the load of one.
"""

import json
import random
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import grpc
import torch

import secateur
from secateur_proto import checkpoints_pb2
from secateur_proto import pruner_pb2 as pb
from secateur_proto.checkpoints_pb2_grpc import CheckpointsStub
from secateur_proto.framing import cut
from secateur_proto.pruner_pb2_grpc import PrunerStub
from tests.contract.raw import OWN_CONNECTION, bearer, header, message
from tests.soak import checked
from tests.soak.models import Case, read_cases
from tests.soak.wrong import Connection, wrong
from tests.storage.stored import file_message, upload_file

# How often each model is used, in percent.
SHARES = {
    "lenet": 30,
    "pruned lenet": 16,
    "half lenet": 10,
    "1M": 14,
    "1M bf16": 12,
    "5M": 7,
    "5M fp16": 6,
    "20M": 3,
    "20M bf16": 2,
}
OPTIONS = [OWN_CONNECTION, ("grpc.max_receive_message_length", -1)]
# Seconds. A call that takes longer hangs.
TIMEOUT = 300.0
MOST_ERRORS = 20


@dataclass(frozen=True)
class Plan:
    """The task of a process of callers.

    Attributes:
        address: Of the server.
        token: Of all callers of the process.
        folder: Of the models.
        seconds: How long they work.
        seed: Of the process.
        callers: Their number.
    """

    address: str
    token: str
    folder: str
    seconds: float
    seed: int
    callers: int


class Tally:
    """The outcomes of all calls of a process."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.errors: list[str] = []
        self._lock = threading.Lock()

    def add(self, what: str, outcome: str) -> None:
        with self._lock:
            self.counts[f"{what}: {outcome}"] += 1

    def wrong(self, what: str, error: BaseException) -> None:
        self.add(what, f"UNEXPLAINED {type(error).__name__}")
        with self._lock:
            if len(self.errors) < MOST_ERRORS:
                text = "".join(traceback.format_exception(error))
                self.errors.append(f"{time.strftime('%H:%M:%S')} {what}: {text}")


class Caller:
    """One caller, with its own connection or a shared one."""

    def __init__(self, plan: Plan, index: int, cases: dict[str, list[Case]], tally: Tally) -> None:
        self.plan, self.cases, self.tally = plan, cases, tally
        self.draws = random.Random(f"{plan.seed} {index}")
        self.scratch = Path(plan.folder) / f"{plan.seed}-{index}.safetensors"
        self._shares_connection = index % 2 == 0
        self._opened = ExitStack()
        self._connect()

    def _connect(self) -> None:
        address, name = self.plan.address, self.plan.token
        self.channel = self._opened.enter_context(grpc.insecure_channel(address, OPTIONS))
        own = None if self._shares_connection else self.channel
        self.client = self._opened.enter_context(
            secateur.Client(address, name, timeout=TIMEOUT, channel=own)
        )

    def work(self, until: float) -> None:
        with self._opened:
            while time.monotonic() < until:
                what, do = self._choose()
                try:
                    self.tally.add(what, do() or "ok")
                except Exception as error:
                    self.tally.wrong(what, error)

    def _choose(self) -> tuple[str, Callable[[], str | None]]:
        draws, case = self.draws, self._case()
        if draws.random() < 0.1:
            return "bad input", self._wrong
        kinds: list[tuple[str, int, Callable[[], str | None]]] = [
            ("prune", 40, partial(checked.prune, self.client, case, draws)),
            ("report", 10, partial(checked.report, self.client, case)),
            ("finalize", 10, partial(checked.finalize, self.client, case)),
            ("checkpoint", 12, partial(self._visit, case)),
            ("prune and keep", 4, partial(self._keep, case)),
            ("cancelled half way", 12, partial(self._leave, case)),
            ("short deadline", 5, partial(self._hurry, case)),
            ("new connection", 1, self._reconnect),
        ]
        (chosen,) = draws.choices(kinds, [share for _, share, _ in kinds])
        return chosen[0], chosen[2]

    def _case(self) -> Case:
        (kind,) = self.draws.choices(list(SHARES), list(SHARES.values()))
        return self.draws.choice(self.cases[kind])

    def _wrong(self) -> str:
        connection = Connection(self.plan.address, self.channel, self.plan.token, self.client)
        return wrong(connection, self.draws, self.scratch.parent)

    def _reconnect(self) -> None:
        self._opened.close()
        self._connect()

    # Checkpoints ------------------------------------------------------------------------------

    def _visit(self, case: Case) -> None:
        """Makes several kinds of calls on a checkpoint."""
        client, draws = self.client, self.draws
        uploaded = client.upload(draws.choice([case.source, case.path]), False)
        kept = checked.prune_handle(client, uploaded, case, draws, keep=True)
        assert kept is not None
        steps: list[Callable[[], object]] = [
            lambda: self._listed(kept),
            lambda: checked.prune_again(client, kept, case, draws),
            lambda: checked.report_handle(client, kept, case.pruned, case),
            lambda: checked.report_handle(client, uploaded, case.folded, case),
            lambda: checked.finalize_handle(client, kept, case),
            lambda: self._download(kept, case),
            lambda: checked.download(client, uploaded, case.folded, case, "dense", self.scratch),
        ]
        for step in draws.sample(steps, 4):
            step()
        for checkpoint in (uploaded, kept):
            client.delete(checkpoint)
        with suppress(secateur.CheckpointNotFound):
            client.report(kept, progress=False)
            raise AssertionError("a checkpoint exists after it was deleted")

    def _listed(self, checkpoint: secateur.Checkpoint) -> None:
        """Checks that a checkpoint is listed. Its expiration time changes with every use."""
        listed = {each.name: each.files for each in self.client.checkpoints()}
        assert listed[checkpoint.name] == checkpoint.files
        assert self.client.checkpoint(checkpoint.name).files == checkpoint.files

    def _download(self, kept: secateur.Checkpoint, case: Case) -> None:
        output = self.draws.choice(["dense", "reparametrized", "masks"])
        checked.download(self.client, kept, case.pruned, case, output, self.scratch)

    def _keep(self, case: Case) -> None:
        output = self.draws.choice(checked.OUTPUTS)
        result = self.client.prune(case.source, case.spec, output, False, keep=True)
        checked.check_result(result, output, case.pruned, case)
        assert result.checkpoint is not None
        checked.report_handle(self.client, result.checkpoint, case.pruned, case)
        self.client.delete(result.checkpoint)

    # Cancellation -----------------------------------------------------------------------------

    def _hurry(self, case: Case) -> str:
        """Makes a call with a deadline that may be too short."""
        seconds = self.draws.uniform(0.001, 0.3)
        address, name = self.plan.address, self.plan.token
        with secateur.Client(address, name, timeout=seconds) as client:
            try:
                checked.prune(client, case, self.draws)
            except (secateur.DeadlineExceeded, secateur.ServerBusy) as error:
                return type(error).__name__
        return "ok"

    def _leave(self, case: Case) -> str:
        """Cancels a call, or closes its connection, at any moment."""
        data, draws = case.path.read_bytes(), self.draws
        count = -(-len(data) // (1 << 20))
        at = draws.randrange(count + 1)
        is_cut, pause = draws.random() < 0.5, draws.choice([0.0, 0.01, 0.1, 0.5])
        rpc = draws.choice(["Prune", "Report", "Finalize", "Upload"])
        sent, ended = threading.Event(), threading.Event()

        def messages() -> Iterator[Any]:
            yield from _begin(rpc, case, data, at)
            sent.set()
            if at < count:
                ended.wait(60)

        with grpc.insecure_channel(self.plan.address, OPTIONS) as channel:
            call = _call(channel, rpc, messages(), bearer(self.plan.token))
            try:
                sent.wait(30)
                threading.Event().wait(pause)
                channel.close() if is_cut else call.cancel()
                code = call.code()
            finally:
                ended.set()
        assert code in _MAY_END, f"{rpc}, cancelled half way, ended with {code}: {call.details()}"
        return f"{'cut' if is_cut else 'cancelled'} {rpc} {code.name}"


# How a cancelled call may end. A full queue or another upload of the same model may end it before.
_MAY_END = {
    grpc.StatusCode.OK,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.ABORTED,
}


def _begin(rpc: str, case: Case, data: bytes, most: int) -> Iterator[Any]:
    """The header of a call, and some pieces of its data."""
    if rpc == "Upload":
        files = [upload_file(file_message(data))]
        yield checkpoints_pb2.UploadRequest(header=checkpoints_pb2.UploadHeader(files=files))
        make: Any = checkpoints_pb2.UploadRequest
    else:
        fields: dict[str, Any] = {}
        if rpc == "Prune":
            wanted, arrays = case.spec.encode(case.source)
            if arrays:  # they would have to be a part of the data
                wanted, _ = secateur.identity("*.weight").encode(case.source)
            fields = {"spec": wanted, "output": pb.OUTPUT_DENSE}
        yield message(rpc, header=header(rpc, len(data), **fields))
        make = partial(message, rpc)
    for _, piece in zip(range(most), cut([data]), strict=False):
        yield make(data=bytes(piece))


def _call(channel: grpc.Channel, rpc: str, messages: Iterator[Any], metadata: Any) -> grpc.Call:
    if rpc == "Upload":
        method: Any = CheckpointsStub(channel).Upload
    else:
        method = getattr(PrunerStub(channel), rpc)
    start = method if rpc in ("Prune", "Finalize") else method.future
    return cast(grpc.Call, start(messages, timeout=TIMEOUT, metadata=metadata))


def main() -> None:
    """Reads a plan from stdin, and writes the outcomes to stdout."""
    torch.set_num_threads(1)
    plan = Plan(**json.load(sys.stdin))
    cases = read_cases(Path(plan.folder), SHARES)
    tally = Tally()
    until = time.monotonic() + plan.seconds
    threads = [
        threading.Thread(target=Caller(plan, index, cases, tally).work, args=(until,))
        for index in range(plan.callers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    json.dump({"counts": tally.counts, "errors": tally.errors}, sys.stdout)


def as_json(plan: Plan) -> bytes:
    """Encodes a plan for `main`."""
    return json.dumps(asdict(plan)).encode()


if __name__ == "__main__":
    main()
