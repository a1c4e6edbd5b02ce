"""Makes the messages of checkpoints, files and progress."""

from google.protobuf.timestamp_pb2 import Timestamp

from secateur_proto.checkpoint_pb2 import PHASE_PRUNE, PHASE_READ, PHASE_WAIT, PHASE_WRITE
from secateur_proto.checkpoint_pb2 import Checkpoint as CheckpointMessage
from secateur_proto.checkpoint_pb2 import File as FileMessage
from secateur_proto.checkpoint_pb2 import Progress as ProgressMessage
from secateur_server.runtime.context import RequestContext
from secateur_server.storage.records import Record, StoredFile
from secateur_server.wire.writer import OutgoingFile

# For each phase of a call: its enum, and the shares of the whole at its beginning and end. Reading
# takes most of the time.
_PHASES = {
    "": (PHASE_READ, 0.0, 0.0),
    "fetch": (PHASE_READ, 0.0, 0.4),
    "read": (PHASE_READ, 0.0, 0.5),
    "prune": (PHASE_PRUNE, 0.5, 0.5),
    "write": (PHASE_WRITE, 0.5, 1.0),
}


def checkpoint_message(record: Record, expire_time: float | None) -> CheckpointMessage:
    """Makes the message of a checkpoint. `expire_time` is in seconds since 1970."""
    message = CheckpointMessage(
        name=record.name,
        create_time=_timestamp(record.create_time),
        files=map(file_message, record.files),
        size_bytes=sum(file.size for file in record.files),
        mask_bytes=record.masks.size if record.masks else 0,
    )
    if expire_time is not None:
        message.expire_time.CopyFrom(_timestamp(int(expire_time * 1e9)))
    return message


def file_message(file: StoredFile | OutgoingFile) -> FileMessage:
    """Makes the message of a file."""
    return FileMessage(filename=file.filename, size_bytes=file.size, blake3=file.blake3)


def progress_message(context: RequestContext) -> ProgressMessage:
    """Makes the message that says how far a call is."""
    name, total, begin = context.now
    phase, before, after = _PHASES[name]
    within = min(1.0, (context.done - begin) / total) if total else 0.0
    phase = PHASE_WAIT if context.is_waiting else phase
    context.share = max(context.share, before + (after - before) * within)
    return ProgressMessage(phase=phase, read_bytes=context.read, share=context.share)


def _timestamp(nanoseconds: int) -> Timestamp:
    stamp = Timestamp()
    stamp.FromNanoseconds(nanoseconds)
    return stamp
