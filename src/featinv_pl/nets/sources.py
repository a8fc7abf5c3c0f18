"""Where weights come from: a folder in diffusers' layout, the hub, or one file. None of them may run code."""

import hashlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from featinv_pl.errors import UserError
from featinv_pl.files import LARGEST, read_bytes, read_json
from featinv_pl.nets.pickles import check_archive, is_plain, load_pickle, state_dict

Part = TypeVar("Part", UNet2DConditionModel, AutoencoderKL)

INDEX, SUMS = "model_index.json", "SHA256SUMS"
DROPPED = 1 << 21  # values that diffusers makes for a ControlNet's pictures, which ours has none of, and more
SUMMED = (".json", ".safetensors")  # all that a model folder is loaded from
SPAWNED = ".temp.ckpt"  # bare weights, by which Lightning's spawned processes hand over what they have trained
HUB_DUPLICATES = ["*.fp16.*", "*non_ema*", "*.msgpack", "*.onnx"]


def find_folder(source: str, files: list[str], option: str) -> Path:
    """The folder of a source, fetched from the hub where it is a name.

    Args:
        source: A folder, or a name on the hub.
        files: Patterns of the files that are needed.
        option: The option that named the source, for errors.
    """
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(source, allow_patterns=files, ignore_patterns=HUB_DUPLICATES))
    except (OSError, ValueError) as error:  # what the hub's errors all are
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{option}: '{source}' is no folder, no file, and could not be fetched from the hub ({reason}). "
            "Check the name and the network, or download it and give its folder."
        ) from error


def load_part(kind: type[Part], folder: Path, option: str) -> Part:
    """Load one network in diffusers' layout, refusing a file in which weights are missing."""
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{option}: '{folder}' holds no config.json. Give a folder in diffusers' layout, "
            f"with config.json and weights of a {kind.__name__}."
        )
    # Old folders hold a pickle alone, which diffusers reads as tensors only.
    safe = not any(folder.glob("*.bin")) or any(folder.glob("*.safetensors"))
    config = read_json(folder / "config.json", option, "Make it anew, or copy it again.")
    for name, parameter in inspect.signature(kind).parameters.items():  # what is no number would fail while drawing
        if isinstance(parameter.default, float) and not isinstance(config.get(name, 0.0), int | float):
            raise UserError(f"{option}: '{folder / 'config.json'}' is damaged ({name} is no number). Make it anew.")
    _check_parts(folder, option)
    try:
        with no_larger(size_below(folder), f"'{folder}'", option):
            network, report = kind.from_pretrained(
                folder, use_safetensors=safe, low_cpu_mem_usage=False, output_loading_info=True
            )
    except UserError:
        raise
    except Exception as error:  # a hostile configuration can raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise UserError(f"{option}: '{folder}' could not be loaded as {kind.__name__}: {reason}") from error
    if report["missing_keys"]:
        raise UserError(
            f"{option}: '{folder}' lacks {len(report['missing_keys'])} weights of {kind.__name__}, "
            f"such as {report['missing_keys'][0]}. The file is damaged or of another architecture."
        )
    check_finite(network.state_dict(), f"'{folder}'", option)
    loaded: Part = network
    for tensor in chain(loaded.parameters(), loaded.buffers()):
        tensor.data = tensor.data.clone()  # of the file, which would stay in memory whole, and could change below us
    return loaded


@contextmanager
def no_larger(size: int, what: str, option: str) -> Iterator[None]:
    """Let no network be built with more values than its files have bytes, for a configuration may ask for any number.

    Args:
        size: Of the files.
        what: Where they are, in the error's words.
        option: The option that named them, for errors.
    """
    left = size + DROPPED
    refusal = UserError(f"{option}: {what} asks for more weights than its files can hold. Use another model.")

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal left
        left -= parameter.numel() if parameter is not None else 0
        if left < 0:
            raise refusal

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    except RuntimeError as error:
        if "allocate" in str(error):  # a single tensor that no memory holds
            raise refusal from error
        raise
    finally:
        hook.remove()


def size_below(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def check_finite(weights: dict[str, Tensor], what: str, option: str) -> None:
    """Refuse weights that are NaN or infinite.

    Args:
        weights: By name.
        what: Where they come from, in the error's words.
        option: The option that named the source, for errors.
    """
    wrong = [name for name, value in weights.items() if value.is_floating_point() and not value.isfinite().all()]
    if wrong:
        raise UserError(
            f"{option}: {len(wrong)} tensors of {what} are not finite, such as {wrong[0]}. Use another file."
        )


def _check_parts(folder: Path, option: str) -> None:
    """Refuse large weights in parts, of which some lie outside their folder."""
    for index in folder.glob("*.index.json"):
        parts = read_json(index, option, "Download the model again.").get("weight_map")
        for name in parts.values() if isinstance(parts, dict) else [parts]:
            if not isinstance(name, str) or Path(name).name != name:
                raise UserError(
                    f"{option}: '{index}' names the file {str(name)[:100]!r}, which is none of its folder. Do not use "
                    "this model: it is damaged, or made to reach outside."
                )


def fill(network: Any, weights: dict[str, Tensor], what: str, option: str) -> Any:
    """Load weights into a network, naming what is missing, too much or of another shape.

    Args:
        network: Is left as it was if anything is wrong.
        weights: By the names of its state dict.
        what: The network, in the error's words.
        option: The option that named the source, for errors.

    Returns:
        What `load_state_dict` returns.
    """
    expected = network.state_dict()
    wrong = [
        name
        for name in dict.fromkeys([*expected, *weights])
        if name not in expected or not is_plain(weights.get(name)) or weights[name].shape != expected[name].shape
    ]
    if wrong:
        raise UserError(
            f"{option}: {len(wrong)} tensors of the {what} are missing, too many or of another shape (it has "
            f"{len(expected)}), such as {wrong[0]}. They belong to another architecture, or the file is not whole."
        )
    check_finite(weights, f"the {what}", option)
    return network.load_state_dict(weights)


def read_index(folder: Path, option: str) -> dict[str, Any]:
    """Read what a model folder says of itself.

    Args:
        folder: As `export` and `import` write it.
        option: The option that named it, for errors.
    """
    if not (folder / INDEX).is_file():
        raise UserError(
            f"{option}: '{folder}' has no {INDEX}, so it is no published model. "
            "Give a folder that `featinv-pl export` or `featinv-pl import` has written."
        )
    return read_json(folder / INDEX, option, "Export the model anew.")


def write_sums(folder: Path) -> None:
    """Write the SHA-256 of every file of a model folder, in the form that `sha256sum --check` reads."""
    lines = [f"{digest}  {name}\n" for name, digest in _sums(folder).items()]
    (folder / SUMS).write_text("".join(lines))


def check_sums(folder: Path, option: str) -> None:
    """Refuse a model folder that is not as it was written; folders of before have no such sums.

    Args:
        folder: As `export` and `import` write it.
        option: The option that named it, for errors.
    """
    if not (folder / SUMS).exists():
        return
    text = read_bytes(folder / SUMS, option, "Copy the folder again.").decode(errors="replace")
    listed = {name: digest for digest, _, name in (line.partition("  ") for line in text.splitlines())}
    found = _sums(folder)
    changed = [name for name in sorted({*listed, *found}) if listed.get(name) != found.get(name)]
    if changed:
        raise UserError(
            f"{option}: {len(changed)} files of '{folder}' are not as {SUMS} in it says, such as '{changed[0]}'. "
            f"Copy the folder again; if you changed it yourself, remove {SUMS}."
        )


def _sums(folder: Path) -> dict[str, str]:
    """The SHA-256 of all that a model folder is loaded from, by path below it."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.suffix in SUMMED and path.is_file() and not any(part.startswith(".") for part in name.parts):
            with path.open("rb") as file:
                whole = path.suffix != ".json" or path.stat().st_size <= LARGEST
                digests[name.as_posix()] = hashlib.file_digest(file, "sha256").hexdigest() if whole else "too large"
    return digests


def read_weights(path: Path, option: str) -> dict[str, Tensor]:
    """Read a state dict from `.safetensors`, or from a file of torch of any other name (`.ckpt`, `.pth.tar`, `.bin`).

    A file of torch is a pickle, which may call any function. Torch's `weights_only` refuses all but
    tensors; arrays and numbers of NumPy are read as tensors; objects of Lightning, OmegaConf and NumPy, which
    checkpoints often carry, are replaced by nothing. Anything else is refused.

    Args:
        path: The file.
        option: The option that named it, for errors.

    Returns:
        Tensors by name, of the entry that training scripts keep them in, such as `state_dict`, if there is one.
    """
    if not path.is_file():
        raise UserError(f"{option}: there is no file '{path}'. Check the path.")
    try:
        weights = state_dict(load_file(path) if path.suffix == ".safetensors" else load_pickle(path, option))
    except UserError:
        raise
    except Exception as error:  # a hostile file can raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{option}: '{path}' is damaged or is no file of weights ({reason}). Download or copy it again."
        ) from error
    if not weights:
        raise UserError(f"{option}: '{path}' holds no tensors. Give a file with a state dict.")
    return weights


def read_checkpoint(path: Path, option: str, map_location: str = "cpu") -> dict[str, Any]:
    """Read a checkpoint of our own runs, which holds nothing but tensors and plain values.

    Args:
        path: The file.
        option: The option that named it, for errors.
        map_location: `meta` checks the file without keeping its tensors.

    Raises:
        UserError: There is no such file, it is damaged, or it wants to run code.
    """
    if not path.is_file():
        raise UserError(f"{option}: there is no file '{path}'. Check the path.")
    try:
        check_archive(path)
        checkpoint: Any = torch.load(path, map_location=map_location, weights_only=True, mmap=map_location == "meta")
    except Exception as error:  # a hostile file can raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{option}: '{path}' is damaged or is no checkpoint ({reason}). Give another one.") from error
    found: dict[str, Any] = checkpoint if isinstance(checkpoint, dict) else {}
    if path.name == SPAWNED and found:
        return found
    weights = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not (isinstance(weights, dict) and weights and all(isinstance(name, str) for name in weights)):
        raise UserError(f"{option}: '{path}' is no checkpoint, for it holds no weights. Give another one.")
    if not isinstance(checkpoint.get("global_step"), int):
        raise UserError(f"{option}: '{path}' is no checkpoint, for it knows no step. Give another one.")
    return found
