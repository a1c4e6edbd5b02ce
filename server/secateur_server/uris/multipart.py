"""Objects of S3 that other processes write in parts, and that the server puts in place."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from secateur_server.runtime.context import RequestContext
from secateur_server.uris.remote import CONCURRENT_RANGES, part_bytes
from secateur_server.uris.requests import Requests
from secateur_server.uris.systems import Prefixes, failed, open_system
from secateur_server.wire.writer import OutgoingFile, track_progress

Bytes = bytes | memoryview

# The numbers of uploaded parts, and their ETags.
Uploaded = tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class MultipartPlace:
    """An upload that a MultipartTarget has begun. It can be pickled.

    Attributes:
        field: Of the request, for errors.
        uri: Of the object.
        prefixes: Prefixes of allowed URIs.
        timeout: Seconds that the store has for each request.
        bucket, key: Of the object.
        upload: The id of the upload.
    """

    field: str
    uri: str
    prefixes: tuple[str, ...]
    timeout: float
    bucket: str
    key: str
    upload: str

    def write(self, context: RequestContext, file: OutgoingFile) -> Uploaded:
        """Uploads the whole file. A repetition replaces the same parts.

        Raises:
            UriFailed: The store failed, or the call has ended.
        """
        parts = _cut(track_progress(context, file.parts()), part_bytes(file.size))
        return self.upload_parts(context, parts)

    def upload_parts(self, context: RequestContext, parts: Iterable[bytes]) -> Uploaded:
        """Uploads parts, CONCURRENT_RANGES of them at once."""
        requests = Requests(self.timeout)
        prefixes = self.prefixes
        system, _ = open_system(context, self.field, self.uri, requests, prefixes)
        pending: deque[Future[Any]] = deque()
        tags = []
        try:
            for number, part in enumerate(parts, 1):
                request = {"PartNumber": number, "Body": part, **self.address}
                pending.append(requests.start(context, system, "call_s3", "upload_part", **request))
                if len(pending) == CONCURRENT_RANGES:
                    tags.append(requests.result(context, pending.popleft())["ETag"])
            while pending:
                tags.append(requests.result(context, pending.popleft())["ETag"])
        except Exception as error:
            raise failed(self.field, self.uri, "written", error) from None
        finally:
            for late in pending:
                late.cancel()
        return tuple(enumerate(tags, 1))

    @property
    def address(self) -> dict[str, str]:
        """What each request about the upload names."""
        return {"Bucket": self.bucket, "Key": self.key, "UploadId": self.upload}


class MultipartTarget:
    """An object of S3 to write, which `commit` puts in place as a whole.

    Args:
        context: The request.
        field: Of the request, for errors.
        uri: Of the object.
        requests: Makes the requests.
        prefixes: Prefixes of allowed URIs.

    Raises:
        UriFailed: It cannot be written.
        Cancelled: The request has been cancelled.
    """

    def __init__(
        self,
        context: RequestContext,
        field: str,
        uri: str,
        requests: Requests,
        prefixes: Prefixes,
    ) -> None:
        self._context, self._requests = context, requests
        self._field, self._uri = field, uri
        self._system, path = open_system(context, field, uri, requests, prefixes)
        bucket, key, _ = self._system.split_path(path)
        begun = self._call("create_multipart_upload", Bucket=bucket, Key=key)
        allowed, timeout = tuple(prefixes), requests.timeout
        self._place = MultipartPlace(field, uri, allowed, timeout, bucket, key, begun["UploadId"])
        self._uploaded: Uploaded = ()
        self._is_open = True

    def _call(self, method: str, is_cancellable: bool = True, **arguments: Any) -> Any:
        try:
            request = self._requests.start(
                self._context, self._system, "call_s3", method, **arguments
            )
            return self._requests.result(self._context, request, is_cancellable)
        except Exception as error:
            raise failed(self._field, self._uri, "written", error) from None

    def place(self) -> MultipartPlace:
        """Where another process writes the whole file."""
        return self._place

    def received(self, uploaded: Uploaded) -> None:
        """Notes what the other process has written."""
        self._uploaded = uploaded

    def write(self, parts: Iterable[Bytes]) -> None:
        """Writes a small file as one part."""
        self._uploaded = self._place.upload_parts(self._context, [b"".join(parts)])

    def commit(self) -> None:
        """Puts the object in place, even after cancellation, since others may be in place.

        Raises:
            UriFailed: The store failed.
        """
        parts = [{"PartNumber": number, "ETag": tag} for number, tag in self._uploaded]
        self._call(
            "complete_multipart_upload",
            is_cancellable=False,
            MultipartUpload={"Parts": parts},
            **self._place.address,
        )
        self._is_open = False

    def discard(self) -> None:
        """Aborts the upload if it was not committed."""
        if self._is_open:
            self._requests.finish(self._abort)

    def _abort(self) -> None:
        self._system.call_s3("abort_multipart_upload", **self._place.address)


def _cut(parts: Iterable[Bytes], size: int) -> Iterator[bytes]:
    """The same bytes in parts of `size`; the last one is smaller."""
    collected = bytearray()
    for part in parts:
        collected += part
        while len(collected) >= size:
            yield bytes(collected[:size])
            del collected[:size]
    if collected:
        yield bytes(collected)
