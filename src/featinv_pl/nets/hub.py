"""Folders of models, local or from the hub, with the checksums of ours; `option` named the folder, for errors."""

import hashlib
import inspect
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from diffusers import ModelMixin
from huggingface_hub import HfApi, constants, get_session, snapshot_download
from huggingface_hub.errors import GatedRepoError

from featinv_pl.errors import UserError, reason
from featinv_pl.files import read_bytes, read_json
from featinv_pl.nets.weights import check_finite

Part = TypeVar("Part", bound=ModelMixin)

INDEX, SUMS = "model_index.json", "SHA256SUMS"
SUMMED = (".json", ".safetensors")  # all that a model folder is loaded from
PATIENCE = 6.0  # seconds in which the hub must answer
HUB_DUPLICATES = ["*.fp16.*", "*non_ema*", "*.msgpack", "*.onnx"]


def find_folder(source: str, files: list[str], option: str, revision: str | None = None) -> Path:
    """The folder of a source, which is a folder or a name on the hub; `files` are patterns of what to fetch from it."""
    if Path(source).is_dir():
        return Path(source)
    try:
        with within_reach():
            return Path(
                snapshot_download(source, revision=revision, allow_patterns=files, ignore_patterns=HUB_DUPLICATES)
            )
    except GatedRepoError as error:
        raise UserError(
            f"{option}: '{source}' is gated: its authors ask for consent. Give it on {constants.ENDPOINT}/{source}, "
            "log in with `hf auth login`, and try again."
        ) from error
    except (OSError, ValueError) as error:  # what the hub's errors all are
        raise UserError(
            f"{option}: '{source}' is neither a folder nor a file, and could not be fetched from the hub "
            f"({reason(error)}). Check the name and the network, or download it and give its folder."
        ) from error


def push_folder(
    folder: Path,
    repo_id: str,
    private: bool | None,
    token: str | None,
    revision: str | None,
    commit_message: str,
    create_pr: bool,
) -> str:
    """Upload a model folder to a repository of the hub, which is created if need be; the address of the commit."""
    api = HfApi(token=token)
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        commit: Any = api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message=commit_message, revision=revision, create_pr=create_pr
        )
        return str(commit.commit_url)
    except (OSError, ValueError) as error:  # what the hub's errors all are
        raise UserError(
            f"`repo_id`: '{repo_id}' could not be pushed to {api.endpoint} ({reason(error)}). Check the name, the "
            "network and the token (`hf auth login`)."
        ) from error


def load_part(kind: type[Part], folder: Path, option: str) -> Part:
    """Load one network in diffusers' layout, refusing a file in which weights are missing."""
    path, advice = folder / "config.json", f"Give a folder in diffusers' layout, with the weights of a {kind.__name__}."
    config = read_config(path, option, advice)
    for name, parameter in inspect.signature(kind).parameters.items():  # others would fail while sampling only
        if isinstance(parameter.default, float) and not isinstance(config.get(name, 0.0), int | float):
            raise UserError(f"{option}: {name} in '{path}' is not a number. Download it again.")
    if any(folder.glob("*.index.json")):  # which could name files elsewhere; no supported network needs it
        raise UserError(f"{option}: '{folder}' could not be loaded: its weights are in several files. Save one file.")
    # Old folders hold a pickle alone, which diffusers reads as tensors only.
    safe = not any(folder.glob("*.bin")) or any(folder.glob("*.safetensors"))
    heard = logging.getLogger("diffusers.configuration_utils")  # warns of entries that diffusers itself has written
    level = heard.level
    heard.setLevel(logging.ERROR)
    try:
        network, report = kind.from_pretrained(
            folder, use_safetensors=safe, low_cpu_mem_usage=False, output_loading_info=True
        )
    except Exception as error:  # a hostile configuration can raise anything
        raise UserError(f"{option}: '{folder}' could not be loaded as {kind.__name__}: {reason(error)}") from error
    finally:
        heard.setLevel(level)
    if missing := report["missing_keys"]:
        raise UserError(
            f"{option}: '{folder}' lacks {len(missing)} weights of {kind.__name__}, such as {missing[0]}. "
            "The file is damaged or of another architecture."
        )
    check_finite(network.state_dict(), f"'{folder}'", option)
    loaded: Part = network
    for tensor in [*loaded.parameters(), *loaded.buffers()]:
        tensor.data = tensor.data.clone()  # out of the mapped file, which would stay in memory and could change
    return loaded


def read_config(path: Path, option: str, advice: str) -> dict[str, Any]:
    """Read what a folder says of its network, refusing one with widths and depths above the bytes of its files."""

    def largest(value: Any) -> int:
        if isinstance(value, dict | list):
            return max(map(largest, value.values() if isinstance(value, dict) else value), default=0)
        return value if isinstance(value, int) else 0

    config, folder = read_json(path, option, advice), path.parent
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if (most := largest(config)) > size:
        raise UserError(
            f"{option}: '{folder}' asks for a network of size {most}, and its files have {size} bytes. "
            "Use another model."
        )
    return config


def read_index(folder: Path, option: str) -> dict[str, Any]:
    """Read what a model folder says of itself."""
    return read_config(folder / INDEX, option, "Give a folder that `featinv-pl export` or `featinv-pl import` wrote.")


def write_sums(folder: Path) -> None:
    """Write the SHA-256 of every file of a model folder, in the form that `sha256sum --check` reads."""
    lines = [f"{digest}  {name}\n" for name, digest in _sums(folder).items()]
    (folder / SUMS).write_text("".join(lines))


def check_sums(folder: Path, option: str) -> None:
    """Refuse a model folder that is not as it was written, if it has sums."""
    if not (folder / SUMS).exists():
        return
    text = read_bytes(folder / SUMS, option, "Copy the folder again.").decode(errors="replace")
    listed = {name: digest for digest, _, name in (line.partition("  ") for line in text.splitlines())}
    if changed := sorted({name for name, _ in listed.items() ^ _sums(folder).items()}):
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
                digests[name.as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


@contextmanager
def within_reach() -> Iterator[None]:
    """Use the hub, or what is cached of it where it does not answer within seconds: its client would retry for long.

    Raises:
        ConnectionError: The hub does not answer, and what is asked of it is not in the cache.
    """
    if constants.HF_HUB_OFFLINE or _answers(constants.ENDPOINT):
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    except OSError as error:  # what the hub's errors all are
        raise ConnectionError(f"{constants.ENDPOINT} does not answer, and the cache does not have it") from error
    finally:
        constants.HF_HUB_OFFLINE = False


def _answers(endpoint: str) -> bool:
    """Whether a server says anything within `PATIENCE` seconds."""
    answers: list[Any] = []

    def ask() -> None:
        with suppress(Exception):  # of the network, of any kind
            answers.append(get_session().head(endpoint, timeout=PATIENCE))

    asking = threading.Thread(target=ask, daemon=True)  # a name server is not bound to any time
    asking.start()
    asking.join(PATIENCE)
    return bool(answers)
