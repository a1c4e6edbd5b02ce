"""OUT: where a command has its result written, and by whom."""

from dataclasses import dataclass, replace
from pathlib import Path

from secateur.errors import SecateurError
from secateur.files import check_holds, check_out, check_writable
from secateur.forms import is_model
from secateur.model import Source
from secateur.onnx.files import ONNX_SUFFIX, check_onnx
from secateur.paths import path_of


@dataclass(frozen=True)
class Target:
    """Where a result is written; nowhere if both are None.

    Attributes:
        path: The local path that this process writes.
        uri: The URI that the server writes.
    """

    path: Path | None = None
    uri: str | None = None

    def check_holds(self, source: Source, output: str) -> None:
        """Refuses early what the file cannot hold.

        Raises:
            SecateurError: The message names it.
        """
        if self.path and is_model(output):
            check_holds(self.path, source.others, source.index, source.folder, output == "packed")

    def placed(
        self, model: str, source: Source, output: str, is_embedded: bool
    ) -> tuple[Source | str, "Target"]:
        """Returns the source and the target as the call has them.

        An embedded server reads and writes single .safetensors files itself, so that nothing is
        copied through a connection.
        """
        path, file = self.path, Path(model)
        if path is None or not is_embedded or not is_model(output):
            return source, self
        if path.is_dir() or not source.paths or not file.is_file():
            return source, self
        if {file.suffix, path.suffix} != {".safetensors"}:
            return source, self
        return file.absolute().as_uri(), replace(self, path=None, uri=path.absolute().as_uri())


def check_exists(model: str) -> None:
    """Refuses early a local IN that does not exist: it decides what OUT may be.

    Raises:
        SecateurError: It does not exist.
    """
    is_elsewhere = "://" in model or model.startswith("checkpoints/")
    if not is_elsewhere and not path_of(model).exists():
        raise SecateurError(f"{model}: No such file or directory")


def target_of(out: str | None, model: str, output: str) -> Target:
    """Returns where OUT is, once it is found to be writable.

    Raises:
        SecateurError: It cannot be written, or IN does not exist.
    """
    check_exists(model)
    if out is None:
        return Target()
    if "://" in out:
        return Target(uri=out)
    path, source = path_of(out), path_of(model)
    if path.suffix == ONNX_SUFFIX and not path.is_dir():
        check_onnx(path, source, output)
    if is_model(output):
        check_out(path, source)
    else:
        check_writable(path)
    return Target(path)
