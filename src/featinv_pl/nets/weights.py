"""Weights from elsewhere, read without running anything that they ask for; `option` named the file, for errors."""

import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from featinv_pl.errors import UserError, reason

SPAWNED = ".temp.ckpt"  # bare weights, by which Lightning's spawned processes hand over what they have trained
CONTAINERS = (  # in which training scripts keep a state dict; of several, timm too prefers the moving average
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema"),
    *("state_dict", "model_state_dict", "model", "network", "net"),
)
# Checkpoints keep such objects beside their weights. The format before torch 1.6 cannot list those that it holds.
INERT_PACKAGES = ("pytorch_lightning", "lightning", "omegaconf", "numpy")
NUMPY = ["numpy.dtype", "numpy.ndarray"] + [
    f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")
]


def read_weights(path: Path, option: str) -> dict[str, Tensor]:
    """Read a state dict from `.safetensors`, or from a file of torch of any other name (`.ckpt`, `.pth.tar`, `.bin`).

    A file of torch is a pickle, which may call any function. Torch's `weights_only` refuses all but tensors and plain
    values; objects of Lightning, OmegaConf and NumPy are replaced by nothing. Of several entries, tensors are those of
    the one that training scripts keep them in, such as `state_dict`.

    Raises:
        UserError: There is no such file, it is damaged, it holds no tensors, or it would run code.
    """
    with _opened(path, option, "a file of weights"):
        weights = _tensors(load_file(path) if path.suffix == ".safetensors" else _load_torch(path, option))
    if not weights:
        raise UserError(f"{option}: '{path}' holds no tensors. Give a file with a state dict.")
    return weights


def read_checkpoint(path: Path, option: str, map_location: str = "cpu") -> dict[str, Any]:
    """Read a checkpoint of our own runs, which holds tensors and plain values only; on `meta`, it is only checked.

    Raises:
        UserError: There is no such file, it is damaged, it is not a checkpoint, or it would run code.
    """
    with _opened(path, option, "a checkpoint"):
        check_archive(path)
        mapped = map_location == "meta"
        found: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=True, mmap=mapped)
        weights, step = found.get("state_dict"), found.get("global_step")
        named = isinstance(weights, dict) and weights and all(isinstance(name, str) for name in weights)
        if path.name != SPAWNED and not (named and isinstance(step, int)):
            raise ValueError("it does not hold weights and their step")
        return found


def check_archive(path: Path) -> None:
    """Compare a file of torch with the checksums in it, which torch itself does not; raise whatever its damage does."""
    with zipfile.ZipFile(path) as archive:
        # Torch's entries are never compressed, which may hide any size.
        packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
        damaged = packed[0] if packed else archive.testzip()
    if damaged:
        raise zipfile.BadZipFile(f"its entry {damaged} is not as it was written")


def fill(network: nn.Module, weights: dict[str, Tensor], what: str, option: str) -> Any:
    """Load weights into a network, called `what` in errors, which is left as it was if anything is wrong.

    Raises:
        UserError: Tensors are missing, too many, of another shape or not finite.
    """
    expected = network.state_dict()
    wrong = [
        name
        for name in dict.fromkeys([*expected, *weights])
        if name not in expected or not _is_plain(weights.get(name)) or weights[name].shape != expected[name].shape
    ]
    if wrong:
        raise UserError(
            f"{option}: {len(wrong)} tensors of the {what} are missing, too many or of another shape (it has "
            f"{len(expected)}), such as {wrong[0]}. They belong to another architecture, or the file is incomplete."
        )
    check_finite(weights, f"the {what}", option)
    return network.load_state_dict(weights)


def check_finite(weights: dict[str, Tensor], what: str, option: str) -> None:
    """Refuse weights that are NaN or infinite; `what` says where they come from, in the error's words."""
    if wrong := [name for name, value in weights.items() if not value.isfinite().all()]:
        found = f"{len(wrong)} tensors of {what} are not finite, such as {wrong[0]}"
        raise UserError(f"{option}: {found}. Use another file.")


@contextmanager
def _opened(path: Path, option: str, kind: str) -> Iterator[None]:
    if not path.is_file():
        raise UserError(f"{option}: there is no file '{path}'. Check the path.")
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{option}: '{path}' is damaged or is not {kind} ({reason(error)}). Copy it again, or give another one."
        ) from error


class _Inert:  # stands for any object that is not a tensor
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    __setstate__ = __init__


def _load_torch(path: Path, option: str) -> Any:
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"  # torch's present format, which alone can be mapped into memory
    if is_zip:
        check_archive(path)
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_zip else NUMPY
    inert = [name for name in names if name.split(".")[0] in INERT_PACKAGES]
    try:
        with torch.serialization.safe_globals([(_Inert, name) for name in inert]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except UnpicklingError as error:
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{option}: '{path}' would call {refused[1]} when loaded, which weights have no need of, so it is not "
                "opened. Get the file from a source that you trust, best as .safetensors."
            ) from error
        raise


def _tensors(contents: Any) -> dict[str, Tensor]:
    if not isinstance(contents, dict):
        return {}
    for name in CONTAINERS:
        if found := _tensors(contents.get(name)):
            return found
    return {name: value for name, value in contents.items() if isinstance(name, str) and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and not value.is_quantized
        and not value.is_complex()
        and value.device.type == "cpu"
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )
