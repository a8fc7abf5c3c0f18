"""Files of torch, which are pickles: read without running anything that they ask for."""

import re
import zipfile
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featinv_pl.errors import UserError

CONTAINERS = (  # in which training scripts keep a state dict; of several, timm too prefers the moving average
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema"),
    *("state_dict", "model_state_dict", "model", "network", "net"),
)
# Old checkpoints of Lightning keep such objects beside their weights.
INERT_PACKAGES = ("pytorch_lightning", "lightning", "omegaconf", "numpy")
NUMBER = re.compile(r"[fiub][1248]")  # NumPy's codes of what a tensor can hold


def check_archive(path: Path) -> None:
    """Compare all that a file of torch holds with the checksums in it, which torch itself does not.

    Raises:
        BadZipFile: They differ, or an entry is compressed, which torch's never are and may hide any size.
        Exception: Of other kinds, for other damages of an archive.
    """
    with zipfile.ZipFile(path) as archive:
        packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
        damaged = archive.testzip() if not packed else packed[0]
    if damaged is not None:
        raise zipfile.BadZipFile(f"its entry {damaged} is not as it was written")


def load_pickle(path: Path, option: str) -> Any:
    """Load tensors and plain values, with stand-ins for objects of a few packages.

    Args:
        path: The file.
        option: The option that named it, for errors.

    Raises:
        UserError: It would run code.
        Exception: Of other kinds, for any damage.
    """
    if _is_zip(path):
        check_archive(path)
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except ValueError:  # the format before 1.6, which has no list; its loading is as strict
        names = [*NUMPY]
    inert = [name for name in names if name.split(".")[0] in INERT_PACKAGES]
    try:
        with torch.serialization.safe_globals([(NUMPY.get(name, _Inert), name) for name in inert]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None:
            raise
        raise UserError(
            f"{option}: '{path}' wants to call {refused[1]}, which no weights need, so it is not opened. "
            "Get the file from a source that you trust, best as .safetensors."
        ) from error


def state_dict(contents: Any) -> dict[str, Tensor]:
    """The tensors by name in what a file holds: in one of `CONTAINERS` if there is one, or all that it has itself."""
    if not isinstance(contents, dict):
        return {}
    for name in CONTAINERS:
        if isinstance(contents.get(name), dict) and (found := state_dict(contents[name])):
            return found
    values: dict[str, Any] = {
        name: value.tensor() if isinstance(value, _Array) else value
        for name, value in contents.items()
        if isinstance(name, str)
    }
    return {name: value for name, value in values.items() if is_plain(value)}


def is_plain(value: Any) -> bool:
    """Whether a value is a tensor that has a value for each of its places."""
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and not value.is_quantized
        and not value.is_complex()
        and value.device.type == "cpu"
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def _is_zip(path: Path) -> bool:
    """Whether the file is of torch's present format, which alone can be mapped into memory."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


# Stand-ins. NumPy's own types trust what a pickle says of their memory.


class _Inert:
    """Stands for any object that is not a tensor, and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take what the object took."""

    def __setstate__(self, state: Any) -> None:
        """Forget what the object knew."""


class _Kind:
    """Stands for a `numpy.dtype`."""

    def __init__(self, code: Any = None, *args: Any) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]

    @property
    def dtype(self) -> np.dtype[Any] | None:
        """That of NumPy, or None for what is not a number."""
        known = isinstance(self.code, str) and NUMBER.fullmatch(self.code) and self.order in ("<", ">", "=", "|")
        return np.dtype(f"{self.order}{self.code}") if known else None


class _Array:
    """Stands for an array or a number of NumPy."""

    def __init__(self, kind: Any = None, data: Any = None, *args: Any) -> None:
        # A number is made of its kind and bytes. An array is made empty, and then told its state.
        self.state = (1, (), kind, False, data)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def tensor(self) -> Tensor | None:
        """Its values, or None if they are not numbers."""
        _, shape, kind, by_columns, data = self.state
        dtype = kind.dtype if isinstance(kind, _Kind) else None
        if dtype is None or not isinstance(data, bytes) or len(data) != prod(shape) * dtype.itemsize:
            return None
        values = np.frombuffer(data, dtype).reshape(shape, order="F" if by_columns else "C")
        return torch.from_numpy(values.astype(dtype.newbyteorder("="), order="C"))


_CORES = ("numpy.core.multiarray", "numpy._core.multiarray")  # before NumPy 2, and since
NUMPY: dict[str, type] = {f"{core}.{name}": _Array for core in _CORES for name in ("_reconstruct", "scalar")}
NUMPY |= {"numpy.dtype": _Kind, "numpy.ndarray": _Inert}
