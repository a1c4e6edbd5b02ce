"""The client: sends a model, and gives back what the server makes of it."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self

import grpc

from secateur.address import parse_address
from secateur.channel import Rpcs, Tls, open_channel, read_tls
from secateur.checkpoint import Checkpoint, decode_checkpoint, name_of, place_of, uri_of
from secateur.checks import flag, one_of, patterns, shown, timeout_of
from secateur.choices import AnyGranularity, magnitude
from secateur.defaults import SOME_AMOUNTS, matrices
from secateur.diagnosis import Target, diagnosing
from secateur.download import Receiving
from secateur.errors import InvalidStateDict, SecateurError, Unavailable
from secateur.files import warn_of_rest
from secateur.others import check_names, check_spec, check_storable
from secateur.paths import path_of
from secateur.patience import Answer, Patience
from secateur.plan import Plan, Sensitivity, decode_plan, encode_amounts, sensitivity_of
from secateur.progress import Progress, noting_waits, show_progress, show_work
from secateur.report import Report, decode_report
from secateur.result import FinalizeResult, PruneResult
from secateur.server_info import ServerInfo, decode_server_info
from secateur.source import Source, read_source
from secateur.spec import Spec, checked, select
from secateur.transfer import Received, Upload, errors_of, receive
from secateur.upload import Sending, files_of
from secateur_proto import checkpoints_pb2
from secateur_proto import pruner_pb2 as pb
from secateur_proto.framing import CHUNK_BYTES

_OUTPUTS = {
    "masks": pb.OUTPUT_MASKS,
    "reparametrized": pb.OUTPUT_REPARAMETRIZED,
    "dense": pb.OUTPUT_DENSE,
    "none": pb.OUTPUT_NONE,
}

_LEAVE_OUT = "leave them out of the source"
_PRIORS = {"masks": pb.PRIOR_MASKS, "zeros": pb.PRIOR_ZEROS}

# What a prune that has run out of time still gets to delete the model that it uploaded.
TIDY_SECONDS = 1.0

Patterns = str | Sequence[str] | None


class Client:
    """A connection to a server. Safe to use from several threads.

    address: HOST:PORT or unix:PATH; None is $SECATEUR_SERVER, and then $SECATEUR_TOKEN and
        $SECATEUR_TLS_CA stand in for a token and a tls that are not given.
    token: sent with every call.  tls: True, the path of a PEM file of authorities to trust, or
        credentials of grpc's.
    timeout: seconds for each call of a method, whatever the method asks of the server; each page of
        checkpoints() has its own.  channel: to use instead of an address; it is left open.
    insecure: whether a token may be sent to another machine without TLS.

    What a busy server puts off is sent again when it says so, and what a broken connection cost
    goes on by itself, both within the timeout.

    A source is a torch.nn.Module; a mapping of tensors or arrays; the path of a .safetensors or a
    torch file, or of a model in shards: its index, or the folder; a Checkpoint; or a URI, which
    the server opens.
    key: where the state_dict is in a torch file that holds several mappings of tensors, as
    "ema.model"; None finds the only one.
    progress: None shows a bar on a terminal, True always, False never; a function is called with
    the bytes sent and their total, or, of what the server works on, with parts of 1000.

    Every method raises SecateurError: see secateur.errors for the kinds.
    """

    def __init__(
        self,
        address: str | None = None,
        token: str | None = None,
        tls: Tls = None,
        timeout: float | None = None,
        channel: grpc.Channel | None = None,
        insecure: bool = False,
    ) -> None:
        if channel is None and address is None:
            address, token, tls = _from_environment(token, tls)
        self._timeout = timeout_of(timeout)
        metadata = _authorization(token)
        self._target = None
        self._is_owner = channel is None
        if channel is None:
            credentials = read_tls(tls)
            self._target = Target(parse_address(address), has_tls=credentials is not None)
            _check_secrecy(self._target, token, insecure)
            channel = open_channel(self._target, credentials)
        elif not isinstance(channel, grpc.Channel):
            raise SecateurError(f"channel={shown(channel)} is not a grpc.Channel")
        self._channel = channel
        self._is_closed = False
        self._is_known = False  # whether the server has ever answered
        self._rpcs = Rpcs(self._channel, metadata)

    def prune(
        self,
        source: Any,
        spec: Spec,
        output: str = "masks",
        progress: Progress = None,
        keep: bool = False,
        destination: str | None = None,
        key: str | None = None,
        prior: str = "masks",
    ) -> PruneResult:
        """Prunes a model by a spec.

        source: of a Module the parameters are sent, and not the buffers.
        output: what comes over the wire: "masks" (of one bit an element), "reparametrized",
            "dense", or "none" for the report alone.
        keep: whether the server keeps the result: it is then the result's checkpoint. What the
            server has already of the source is not sent again.
        destination: a URI to which the server writes the output, in place of sending it.
        prior: what counts as pruned before: what "masks" prune, or also the "zeros" of the tensors
            that the spec names, for a model whose earlier pruning left zeros alone.
        """
        _check_output(output)
        spec = checked(spec)
        uri_of(destination)  # before the model is read
        keep = flag("keep", keep)
        counted = one_of("prior", prior, _PRIORS)
        model = read_source(source, key)
        spec = _fitted(spec, model)
        if destination and output in ("dense", "reparametrized"):
            check_storable(destination, model.only_parameters().others, _LEAVE_OUT)
            warn_of_rest(destination, model.torch_file)
        order = _Order(spec, output, progress, keep, destination, counted)
        if keep and model.is_here:
            return self._prune_kept(model, order)
        return self._prune(model, place_of(source), order)

    def _prune(
        self,
        model: Source,
        place: Mapping[str, str],
        order: "_Order",
        patience: Patience | None = None,
    ) -> PruneResult:
        """place: of a model on the server."""
        sent = {n: t for n, t in model.tensors.items() if n in model.parameters}
        message, arrays = order.spec.encode(model.tensors)
        upload = Upload({**sent, **arrays}, model.metadata, is_file=not place)
        header = pb.PruneHeader(
            data_bytes=upload.file_bytes,
            spec=message,
            output=_OUTPUTS[order.output],
            keep=order.keep,
            destination_uri=uri_of(order.destination),
            prior=order.prior,
            **place,
        )
        if not place and upload.file_bytes <= CHUNK_BYTES and order.output in ("masks", "none"):
            result, received = self._prune_small(upload, header, order.progress)
        else:
            rpc = self._rpcs.prune, pb.PruneRequest
            result, received = self._stream(*rpc, header, upload, order.progress, patience)
        kept = decode_checkpoint(result.checkpoint) if order.keep else None
        said = result.report
        return PruneResult(said, model, order.output, received, kept, order.destination)

    def _prune_small(
        self, upload: Upload, header: pb.PruneHeader, progress: Progress
    ) -> tuple[Any, Received]:
        """One message each way, by the protocol: grpc is faster where it knows that."""

        def attempt(left: float | None) -> tuple[Any, Received]:
            with show_progress(progress, upload.file_bytes) as sending, errors_of(upload):
                message = next(upload.messages(pb.PruneRequest, header, sending))
                return receive([self._rpcs.prune_small(message, timeout=left)])

        return self._until_served(attempt, not header.keep)

    def _prune_kept(self, model: Source, order: "_Order") -> PruneResult:
        """Sends what the server does not have of a model, and prunes it there."""
        patience = Patience(self._timeout)
        uploaded = self._upload(model.only_parameters(), order.progress, patience)
        try:
            result = self._prune(read_source(uploaded), place_of(uploaded), order, patience)
        except BaseException:
            with suppress(SecateurError):  # what failed first is told
                self._delete(uploaded, False, patience.at_least(TIDY_SECONDS))
            raise
        # The result stands on the same weights.
        self._delete(uploaded, False, patience.at_least(TIDY_SECONDS))
        return result.of(model)

    def report(
        self,
        source: Any,
        tensors: Patterns = None,
        progress: Progress = None,
        key: str | None = None,
    ) -> Report:
        """Measures how sparse a model is, and where.

        tensors: names and globs; None is every floating tensor.
        """
        return self._report(source, tensors, progress, key)

    def _report(
        self,
        source: Any,
        tensors: Patterns = None,
        progress: Progress = None,
        key: str | None = None,
        patience: Patience | None = None,
    ) -> Report:
        model, place = read_source(source, key), place_of(source)
        named = [] if tensors is None else patterns(tensors)
        check_names("tensors", named, model.others)
        upload = Upload(model.tensors, model.metadata, is_file=not place)
        header = pb.ReportHeader(
            data_bytes=upload.file_bytes,
            tensors=named,
            **place,
        )
        rpc = self._rpcs.report, pb.ReportRequest
        answer = self._measure(*rpc, header, upload, progress, patience)
        return decode_report(answer.report)

    def plan(
        self,
        source: Any,
        spec: Spec,
        amounts: Sequence[float] | None = None,
        progress: Progress = None,
        key: str | None = None,
        prior: str = "masks",
    ) -> Plan:
        """Foretells what a prune would do, and prunes nothing.

        spec: its last rule is planned, after those before it, and must be no custom_from_mask.
        amounts: ints and floats in place of that rule's own, at most 1000; one call looks at the
            weights once for all of them.
        prior: as of prune.
        """
        return self._plan(source, spec, amounts, progress, key, prior)

    def _plan(
        self,
        source: Any,
        spec: Spec,
        amounts: Sequence[float] | None = None,
        progress: Progress = None,
        key: str | None = None,
        prior: str = "masks",
        patience: Patience | None = None,
    ) -> Plan:
        model, place = read_source(source, key), place_of(source)
        spec = _fitted(checked(spec), model)
        sent = {n: t for n, t in model.tensors.items() if n in model.parameters}
        message, arrays = spec.encode(model.tensors)
        upload = Upload({**sent, **arrays}, model.metadata, is_file=not place)
        header = pb.PlanHeader(
            data_bytes=upload.file_bytes,
            spec=message,
            amounts=[] if amounts is None else encode_amounts(amounts),
            prior=one_of("prior", prior, _PRIORS),
            **place,
        )
        rpc = self._rpcs.plan, pb.PlanRequest
        answer = self._measure(*rpc, header, upload, progress, patience)
        return decode_plan(answer.plan, header)

    def sensitivity(
        self,
        source: Any,
        tensors: Patterns = None,
        amounts: Sequence[float] = SOME_AMOUNTS,
        granularity: AnyGranularity = "element",
        p: float = 1,
        progress: Progress = None,
        key: str | None = None,
    ) -> Sensitivity:
        """How much of its norm each tensor loses by each amount, pruned by magnitude by itself.

        tensors: names and globs; None is every floating tensor of 2 or more dimensions.
        granularity: as of `select`.  p: of the norm that ranks units larger than elements.
        """
        read = read_source(source, key)
        source = read if read.is_here else source
        patience = Patience(self._timeout)
        report = partial(self._report, patience=patience)
        names = matrices(report, source) if tensors is None else tensors
        spec = select(names, 0, magnitude(p), granularity)
        return sensitivity_of(self._plan(source, spec, amounts, progress, patience=patience))

    def _measure(
        self,
        rpc: Any,
        make: Callable[..., Any],
        header: Any,
        upload: Upload,
        progress: Progress,
        patience: Patience | None,
    ) -> Any:
        """A call that carries its model, or names it, and is answered by one message."""
        # Of what is on the server there is nothing to say on the way, and a bar of 0 bytes no more.
        shown = False if header.WhichOneof("source") else progress

        def attempt(left: float | None) -> Any:
            with show_progress(shown, upload.file_bytes) as sending:
                call = rpc.future(upload.messages(make, header, sending), timeout=left)
                with errors_of(upload, call):
                    return call.result()

        return self._until_served(attempt, patience=patience)

    def finalize(
        self,
        source: Any,
        tensors: Patterns = None,
        progress: Progress = None,
        destination: str | None = None,
        key: str | None = None,
    ) -> FinalizeResult:
        """Makes pruning permanent: each pair X_orig, X_mask becomes X.

        tensors: names and globs of what to fold; None is all.  destination: as of prune.
        As torch.nn.utils.prune.remove.
        """
        destination_uri = uri_of(destination)
        model, place = read_source(source, key), place_of(source)
        named = [] if tensors is None else patterns(tensors)
        check_names("tensors", named, model.others)
        if destination:
            check_storable(destination, model.others, _LEAVE_OUT)
        upload = Upload(model.tensors, model.metadata, is_file=not place)
        header = pb.FinalizeHeader(
            data_bytes=upload.file_bytes,
            tensors=named,
            destination_uri=destination_uri,
            **place,
        )
        if destination:
            warn_of_rest(destination, model.torch_file)
        call = self._stream(self._rpcs.finalize, pb.FinalizeRequest, header, upload, progress)
        result, received = call
        return FinalizeResult(decode_report(result.report), model, received, destination)

    def _stream(
        self,
        rpc: Any,
        make: Callable[..., Any],
        header: Any,
        upload: Upload,
        progress: Progress,
        patience: Patience | None = None,
    ) -> tuple[Any, Received]:
        """A call that carries its model, or one on what the server opens."""

        def carrying(left: float | None) -> tuple[Any, Received]:
            with show_progress(progress, upload.file_bytes) as sending:
                call = rpc(upload.messages(make, header, sending), timeout=left)
                with errors_of(upload, call):
                    return receive(call)

        def naming(left: float | None) -> tuple[Any, Received]:
            with show_work(progress) as shown, noting_waits(shown) as working:
                call = rpc(upload.messages(make, header, lambda count: None), timeout=left)
                with errors_of(upload, call):
                    return receive(call, working)

        attempt = naming if header.WhichOneof("source") else carrying
        return self._until_served(attempt, not getattr(header, "keep", False), patience)

    def _until_served(
        self,
        attempt: Callable[[float | None], Answer],
        is_safe: bool = True,
        patience: Patience | None = None,
    ) -> Answer:
        """As Patience.until_served.  patience: of a method that makes several calls."""
        patience = patience or Patience(self._timeout)
        with self._diagnosing():
            answer = patience.until_served(attempt, self._is_known, is_safe)
        self._is_known = True
        return answer

    def _diagnosing(self) -> AbstractContextManager[None]:
        return diagnosing(self._target, self._timeout, self._is_known)

    def upload(self, source: Any, progress: Progress = None, key: str | None = None) -> Checkpoint:
        """Stores a model on the server, where it stays until it is deleted, or has to make room.

        Files that the server has from this caller are not sent, and an upload that breaks goes on
        from where it was, within the timeout.
        Errors: InvalidStateDict, for entries that a safetensors file cannot hold.
        """
        model = read_source(source, key)
        if "uri" in (place := place_of(source)):
            return self._upload_uri(place["uri"])
        if not model.is_here:
            raise InvalidStateDict("a checkpoint is on the server already")
        return self._upload(model, progress, Patience(self._timeout))

    def _upload(self, model: Source, progress: Progress, patience: Patience) -> Checkpoint:
        check_storable("a checkpoint", model.others, _LEAVE_OUT)
        files = files_of(model)
        rpcs = self._rpcs.query_upload, self._rpcs.upload
        sending = Sending(*rpcs, patience, self._is_known)
        total = sum(file.size for file in files)
        with show_progress(progress, total) as shown, self._diagnosing():
            checkpoint = sending.send(files, shown)
        self._is_known = True
        return checkpoint

    def _upload_uri(self, uri: str) -> Checkpoint:
        """Stores a model that the server opens."""
        header = checkpoints_pb2.UploadHeader(uri=uri)
        request = checkpoints_pb2.UploadRequest(header=header)

        def attempt(left: float | None) -> Any:
            with errors_of(None):
                return self._rpcs.upload(iter([request]), timeout=left)

        return decode_checkpoint(self._until_served(attempt, is_safe=False))

    def download(
        self,
        checkpoint: Checkpoint | str,
        path: str | os.PathLike[str],
        output: str = "dense",
        progress: Progress = None,
    ) -> None:
        """Writes a checkpoint, or the one of a name, to a file, or its shards to a folder.

        output: as of prune, but for "none". What was never pruned comes as it was uploaded.
        A download whose connection breaks goes on from where it was, within the client's `timeout`.
        """
        _check_output(output)
        name, to = name_of(checkpoint), path_of(path)
        request = checkpoints_pb2.DownloadRequest(name=name, output=_OUTPUTS[output])
        receiving = Receiving(self._rpcs.download, request, to, self._timeout, self._is_known)
        with self._diagnosing():
            receiving.save(progress)
        self._is_known = True

    def checkpoint(self, name: str) -> Checkpoint:
        """A checkpoint by its name.  Errors: CheckpointNotFound."""
        request = checkpoints_pb2.GetRequest(name=name_of(name))
        return decode_checkpoint(self._answer(self._rpcs.get, request))

    def checkpoints(self) -> Iterator[Checkpoint]:
        """All checkpoints of this caller, the newest first; asked for page by page."""
        token = ""
        while True:
            request = checkpoints_pb2.ListRequest(page_token=token)
            page = self._answer(self._rpcs.list, request)
            yield from map(decode_checkpoint, page.checkpoints)
            token = page.next_page_token
            if not token:
                return

    def delete(self, checkpoint: Checkpoint | str) -> None:
        """Deletes a checkpoint; by its name also a damaged one.  Errors: CheckpointNotFound."""
        self._delete(checkpoint, is_there=True)

    def _delete(
        self, checkpoint: Checkpoint | str, is_there: bool, patience: Patience | None = None
    ) -> None:
        """is_there: False where it may have made room for another."""
        request = checkpoints_pb2.DeleteRequest(
            name=name_of(checkpoint), allow_missing=not is_there
        )
        self._answer(self._rpcs.delete, request, not is_there, patience)

    def _answer(
        self, rpc: Any, request: Any, is_safe: bool = True, patience: Patience | None = None
    ) -> Any:
        """Of a call of one message each way."""

        def attempt(left: float | None) -> Any:
            with errors_of(None):
                return rpc(request, timeout=left)

        return self._until_served(attempt, is_safe, patience)

    def server_info(self) -> ServerInfo:
        """The server's version, what it can do, and its limits.

        Raises:
            InvalidRequest: The server is older than this method.
        """
        return decode_server_info(self._answer(self._rpcs.server_info, pb.GetServerInfoRequest()))

    def wait_until_ready(self, timeout: float = 60.0) -> None:
        """Waits for the server to be there, as when both start together.

        timeout: seconds.  Errors: Unavailable.
        """
        if self._is_closed:
            raise SecateurError("the client is closed: make a new one")
        seconds = timeout_of(timeout)
        try:
            grpc.channel_ready_future(self._channel).result(seconds)
        except grpc.FutureTimeoutError:
            with self._diagnosing():
                raise Unavailable(f"there is no server after {timeout:g} seconds") from None

    def close(self) -> None:
        """Closes the connection."""
        self._is_closed = True
        if self._is_owner:
            self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()


@dataclass(frozen=True)
class _Order:
    """What a prune is to do, as Client.prune has it.  prior: as the wire has it."""

    spec: Spec
    output: str
    progress: Progress
    keep: bool
    destination: str | None
    prior: "pb.Prior.ValueType"


def _fitted(spec: Spec, model: Source) -> Spec:
    """The spec for a model whose tensors may be tied.  Errors: InvalidSpec."""
    check_spec(spec, model.others)
    return spec.keep_ends(model.tied_names()).share_arrays(model.other_names)


def _check_output(output: Any) -> None:
    if not isinstance(output, str) or output not in _OUTPUTS:
        raise SecateurError(f"output={shown(output)} is none of {', '.join(_OUTPUTS)}")


def _from_environment(token: str | None, tls: Tls) -> tuple[str, str | None, Tls]:
    """The address, the token and the tls, from variables where they are not given."""
    address = os.environ.get("SECATEUR_SERVER")
    if not address:
        raise SecateurError("give an address, or a channel, or set SECATEUR_SERVER")
    token = os.environ.get("SECATEUR_TOKEN") if token is None else token
    return address, token, os.environ.get("SECATEUR_TLS_CA") or None if tls is None else tls


def _authorization(token: Any) -> tuple[tuple[str, str], ...]:
    """The metadata of every call.  Errors: SecateurError, which does not repeat the token."""
    if token is None or (isinstance(token, str) and not token):
        return ()
    if not isinstance(token, str) or not (token.isascii() and token.isprintable()):
        raise SecateurError("token: it is not a line of printable ASCII characters")
    return (("authorization", f"Bearer {token}"),)


def _check_secrecy(target: Target, token: str | None, insecure: bool) -> None:
    """Refuses to send a token over a network in plaintext.  Errors: SecateurError."""
    if token and not (target.has_tls or target.address.is_local or insecure):
        raise SecateurError(
            f"token: it would go to {target.address.text} without encryption; use tls=True or "
            "tls=CA_FILE (--tls or --tls-ca), or insecure=True (--insecure) on a safe network"
        )
