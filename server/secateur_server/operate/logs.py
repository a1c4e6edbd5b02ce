"""One log line for each request: text on a terminal, JSON elsewhere."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

from secateur_server.runtime.context import RequestContext

log = logging.getLogger(__name__)

# Health probes call every few seconds and are not logged.
_OURS = "secateur."


def set_up(form: str) -> None:
    """Sets up logging to stderr as `json`, `text`, or `auto`: text if stderr is a terminal."""
    handler = logging.StreamHandler(sys.stderr)
    is_text = form == "text" or (form == "auto" and sys.stderr.isatty())
    handler.setFormatter(_Text() if is_text else _Json())
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def log_call(call: RequestContext) -> None:
    """Logs a finished call, without weights and tokens."""
    if call.method.service.startswith(_OURS) or call.reason:
        log.info("%s %s", call.method, call.code, extra={"call": fields_of(call)})


def fields_of(call: RequestContext) -> dict[str, Any]:
    """The fields of a finished call, without empty ones. Times are in seconds."""
    fields: dict[str, Any] = {
        "id": call.id,
        "rpc": str(call.method),
        "code": call.code,
        "seconds": round(call.seconds, 6),
        "tenant": call.tenant.name,
        "peer": call.peer,
        "received_bytes": call.received,
        "sent_bytes": call.sent,
        "elements": call.elements,
        "pruned": call.pruned,
        "sparsity": call.sparsity,
        "queue_seconds": None if call.queued is None else round(call.queued, 6),
        "waited_for": call.waited_for,
        "stage_seconds": {name: round(at.seconds, 6) for name, at in call.stages.items()},
        "reason": call.reason,
        "error": call.error,
    }
    return {name: value for name, value in fields.items() if value not in ("", None, {})}


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "message": record.getMessage(),
            **getattr(record, "call", {}),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields)


class _Text(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        call = dict(getattr(record, "call", {}))
        for shown in ("rpc", "code"):  # the message has them
            call.pop(shown, None)
        rest = " ".join(f"{name}={json.dumps(value)}" for name, value in call.items())
        return f"{super().format(record)} {rest}".rstrip()
