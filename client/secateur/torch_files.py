"""Files of torch.save: finds the state_dict in one, and keeps the other content."""

import copy
import errno
import pickle
import re
import sys
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.errors import InvalidStateDict
from secateur.file_kinds import is_torch, open_reason, torch_reason
from secateur.tables import listed
from secateur.tensors import has_torch

# model.pth.tar has the suffix .tar.
TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".tar")
KNOWN_SUFFIXES = ", ".join((".safetensors", *TORCH_SUFFIXES, ".onnx"))

Keys = tuple[str, ...]

# Deeper mappings are not searched: a pickle may hold a mapping that contains itself.
_MOST_LEVELS = 8
_MOST_SHOWN = 8


@dataclass(frozen=True)
class TorchFile:
    """A file of torch.save with one state_dict in it.

    Attributes:
        content: Everything that the file holds.
        keys: The path in `content` to the state_dict; empty if it is `content` itself.
    """

    content: Any
    keys: Keys

    @property
    def state_dict(self) -> Mapping[Any, Any]:
        """The mapping from names to tensors."""
        found = self.content
        for key in self.keys:
            found = found[key]
        return found  # type: ignore[no-any-return]

    @property
    def rest(self) -> list[str]:
        """The dotted keys of all other content."""
        names, level = [], self.content
        for depth, key in enumerate(self.keys):
            names += [".".join((*self.keys[:depth], str(k))) for k in level if k != key]
            level = level[key]
        return names

    def with_values(self, values: Mapping[str, Any]) -> Any:
        """Returns the file's content with `values` as its state_dict."""
        return _replaced(self.content, self.keys, values)


def _replaced(content: Any, keys: Keys, values: Mapping[str, Any]) -> Any:
    changed = copy.copy(content)  # it keeps the _metadata of an OrderedDict
    if keys:
        changed[keys[0]] = _replaced(content[keys[0]], keys[1:], values)
    else:
        changed.clear()
        changed.update(values)
    return changed


def read_torch_file(path: Path, key: str | None = None) -> TorchFile:
    """Reads a file of torch.save without running code from it.

    Args:
        path: The file.
        key: The dotted path to the state_dict; None searches for it.

    Raises:
        InvalidStateDict: The file cannot be read, or it has no state_dict, or several.
    """
    content = _load(path)
    if not isinstance(content, Mapping):
        raise InvalidStateDict(
            f"{path}: holds an object of the class {type(content).__name__}, not a state_dict; "
            "save one: torch.save(model.state_dict(), ...)"
        )
    keys = _find(path, content) if key is None else _named(path, content, key)
    return TorchFile(content, keys)


def _load(path: Path) -> Any:
    if not has_torch():
        raise InvalidStateDict(f"{path}: to read {', '.join(TORCH_SUFFIXES)} install torch")
    import torch

    if reason := open_reason(path):
        raise InvalidStateDict(f"{path}: {reason}")
    if _is_torchscript(path):
        raise InvalidStateDict(
            f"{path}: is a TorchScript file; save its state_dict: "
            "torch.save(torch.jit.load(...).state_dict(), ...)"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InvalidStateDict(f"{path}: {_pickle_reason(path, error)}") from None
    except Exception as error:  # torch raises errors of any kind for a broken file
        raise InvalidStateDict(f"{path}: {_reason(path, error)}") from None


def _reason(path: Path, error: Exception) -> str:
    """Why torch.load cannot read a file."""
    # In a truncated archive torch seeks a place before its begin, which the system calls EINVAL.
    if isinstance(error, OSError) and error.errno != errno.EINVAL and error.strerror:
        return error.strerror
    return torch_reason(path)


def _pickle_reason(path: Path, error: pickle.UnpicklingError) -> str:
    """Why torch.load refuses a file with weights_only=True, and what to do."""
    if not is_torch(path):
        return torch_reason(path)
    found = re.search(r"GLOBAL (\S+)", str(error))
    held = f"an object of the class {found[1]}" if found else "more than tensors"
    advice = "save the state_dict alone: torch.save(model.state_dict(), ...)"
    if found:
        advice += (
            "; or, in Python, if you trust the class: "
            f"torch.serialization.add_safe_globals([{found[1]}])"
        )
    return f"holds {held}, and code is never run from a file; {advice}"


def _is_torchscript(path: Path) -> bool:
    """Whether it is an archive of torch.jit.save: torch.save writes no constants."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except Exception:  # zipfile raises errors of any kind for a broken archive; so does torch
        return False


def _find(path: Path, content: Mapping[Any, Any]) -> Keys:
    """The path to the only state_dict."""
    if _is_state_dict(content):
        return ()
    found = list(_nests(content, ()))
    if len(found) == 1:
        return found[0]
    if found:
        several = {".".join(keys): TorchFile(content, keys).state_dict for keys in found}
        raise InvalidStateDict(
            f"{path}: holds several state_dicts: {_listed(several)}; name one: {_HOW_TO_NAME}"
        )
    raise InvalidStateDict(
        f"{path}: holds no state_dict (a mapping from names to tensors alone): {_listed(content)}; "
        f"if one of these is the model, name it: {_HOW_TO_NAME}; "
        "else save the state_dict: torch.save(model.state_dict(), ...)"
    )


def state_dict_advice(content: Mapping[Any, Any]) -> str:
    """Returns what to pass in place of a mapping that holds more than tensors.

    Args:
        content: Often what torch.load returns of a training checkpoint.
    """
    found: list[Keys] = []
    if "torch" in sys.modules and not any(map(_is_weight, content.values())):
        found = list(_nests(content, ()))[:_MOST_SHOWN]
    if not found:
        return "pass a mapping of tensors or arrays alone, such as module.state_dict()"
    places = ["state" + "".join(f"[{key!r}]" for key in keys) for keys in found]
    return (
        f"pass the state_dict itself: {' or '.join(places)}; "
        f"or the file's path with key={'.'.join(found[0])!r}"
    )


_HOW_TO_NAME = "--key PATH on the command line, key='PATH' in Python"


def _nests(value: Any, keys: Keys) -> Iterator[Keys]:
    """The paths of the mappings that look like the weights of a model."""
    is_searched = isinstance(value, Mapping) and len(keys) <= _MOST_LEVELS
    if not is_searched or _is_optimizer(value):
        return
    if _is_state_dict(value):
        if _has_names(value) and any(map(_is_weight, value.values())):
            yield keys
        return
    for key, inner in value.items():
        if isinstance(key, str):  # optimizers number their states
            yield from _nests(inner, (*keys, key))


def _is_state_dict(value: Mapping[Any, Any]) -> bool:
    """Whether all values are tensors, apart from those of get_extra_state."""
    import torch

    return all(
        isinstance(inner, torch.Tensor) or str(name).rpartition(".")[2] == "_extra_state"
        for name, inner in value.items()
    )


def _has_names(value: Mapping[Any, Any]) -> bool:
    return all(isinstance(name, str) for name in value)


def _is_weight(value: Any) -> bool:
    """Whether it may be a weight: metrics have no dimensions, and random states have bytes."""
    import torch

    is_tensor = isinstance(value, torch.Tensor)
    return is_tensor and value.dim() > 0 and (value.is_floating_point() or value.is_complex())


def _is_optimizer(value: Mapping[Any, Any]) -> bool:
    """Whether it is the state_dict() of a torch.optim.Optimizer."""
    return {"state", "param_groups"} <= value.keys()


def _named(path: Path, content: Mapping[Any, Any], key: str) -> Keys:
    """The path that a user names."""
    keys = _resolved(content, key)
    if keys is None:
        raise InvalidStateDict(f"{path}: has no key {key!r}; it holds {_listed(content)}")
    named = TorchFile(content, keys).state_dict
    if not isinstance(named, Mapping):
        raise InvalidStateDict(f"{path}: key {key!r} is {_described(named)}, not a state_dict")
    if not _is_state_dict(named):
        inner = {f"{key}.{name}": value for name, value in named.items()}
        raise InvalidStateDict(
            f"{path}: key {key!r} is not a mapping from names to tensors alone; "
            f"it holds {_listed(inner)}"
        )
    return keys


def _resolved(content: Any, key: str) -> Keys | None:
    """The keys of a dotted path; a key may have dots itself."""
    for name in content if isinstance(content, Mapping) else ():
        if name == key:
            return (name,)
        if isinstance(name, str) and key.startswith(f"{name}."):
            rest = _resolved(content[name], key.removeprefix(f"{name}."))
            if rest is not None:
                return (name, *rest)
    return None


def _listed(content: Mapping[Any, Any]) -> str:
    """The keys and their content, in one line."""
    shown = [f"{name} ({_described(content[name])})" for name in list(content)[:_MOST_SHOWN]]
    return listed(shown, _MOST_SHOWN, len(content))


def _described(value: Any) -> str:
    if isinstance(value, Mapping):
        what = "tensors" if _is_state_dict(value) else "keys"
        return f"a mapping of {len(value)} {what}"
    if hasattr(value, "shape"):
        return f"a tensor of shape {list(value.shape)}"
    return f"of type {type(value).__name__}"
