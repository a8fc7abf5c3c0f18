"""The folder of a run: one process and a single training at a time; its configuration, trained parts, code and data."""

import json
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import yaml
from filelock import FileLock, Timeout
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback

from featinv_pl.data.shards.manifest import seal
from featinv_pl.errors import UserError
from featinv_pl.files import atomic, remove, write_bytes
from featinv_pl.masking import masked
from featinv_pl.nets.hub import SUMMED, SUMS, check_sums, write_sums
from featinv_pl.runtime.internals import savers
from featinv_pl.runtime.ranks import say

LOCK = ".featinv-pl.lock"


def home(trainer: Any) -> Path:
    """The one folder below which a run of a Trainer, or of its settings, writes."""
    root = str(trainer.default_root_dir or ".")
    if "://" in root:  # it would become a local folder of that name
        raise UserError(
            f"`default_root_dir`: '{masked(root)}' is an address, and a run writes to a folder. Give one on this "
            "machine, and copy it afterwards."
        )
    return Path(root).expanduser()


def written_folders(trainer: Trainer, data: Any, command: str) -> list[Path]:
    """The folders that a command writes to: for an extraction those of its unfinished shard sets alone."""
    writers = [one for one in cast(Any, trainer).callbacks if hasattr(one, "unfinished_folders")]
    if command != "predict" or not writers:
        return [home(trainer)]
    return [folder for writer in writers for folder in writer.unfinished_folders(home(trainer), data)]


def refuse_used(trainer: Trainer, resumed: str | None) -> None:
    """Refuse to train where another training has left its checkpoints: `resumed`, a file or `hpc`, must lie there."""
    dirpaths = [Path(one.dirpath) for one in savers(trainer) if one.dirpath]
    folders = {path.absolute() for path in (home(trainer), *dirpaths)}
    found = [path for folder in sorted(folders) for path in sorted(folder.glob("*.ckpt"))]
    # Which Lightning resumes from by itself.
    requeued = SLURMEnvironment.detect() and any(path.name.startswith("hpc_ckpt_") for path in found)
    if not found or resumed == "hpc" or (resumed is None and requeued):
        return
    if resumed is None or Path(resumed).resolve().parent not in {folder.resolve() for folder in folders}:
        raise UserError(
            f"'{os.path.relpath(found[0])}' is the checkpoint of an earlier training, which another one in this folder "
            "could replace. Resume that one with `ckpt_path` last, or give another folder (`default_root_dir`)."
        )


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder, by a lock of the kernel: it ends with this process, however that ends."""
    new, lock = not folder.exists(), FileLock(folder / LOCK, blocking=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (FileExistsError, FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"`default_root_dir`: '{folder}' cannot be a folder ({error.strerror}). Give another one."
        ) from error
    except Timeout as error:
        owner = ""
        with suppress(OSError):  # it has just ended
            owner = (folder / LOCK).read_text().removesuffix(f" on {socket.gethostname()}")
        raise UserError(
            f"'{folder}' is in use: process {owner} is writing there. Wait until it has ended, or give another folder "
            "(`default_root_dir`)."
        ) from error
    except OSError as error:
        say(f"'{folder}' cannot be locked ({error.strerror}), so start no second run there.")
    try:
        with suppress(OSError):
            (folder / LOCK).write_text(f"{os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        lock.release()
        if new:
            with suppress(OSError):  # it is not empty: something was written
                folder.rmdir()


MODEL = "model"


class SaveConfig(SaveConfigCallback):
    """Writes `<default_root_dir>/<command>.yaml`, and hands the configuration to the loggers once.

    An extraction's, several of which may share that folder, is `<shard set>.yaml` beside each set that it makes. The
    checkpoint that a run began with is left out: whoever uses the file again would train or score that one.

    Loggers also get version and git state of the code, and digests of the shards. Others may see them: credentials
    in addresses are masked in both, and what is logged has `~/...` for paths below the user's home.

    Lightning's own would write before anything is checked: a run that is refused must not overwrite the configuration
    of one that was not.
    """

    def __init__(self, parser: LightningArgumentParser, config: Any) -> None:
        super().__init__(parser, config, save_to_log_dir=False)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Do not save yet: the run may still be refused."""

    def _save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        command = str(trainer.state.fn.value) if trainer.state.fn else ""
        if trainer.is_global_zero and (trainer.training or command != "fit"):  # within which it also validates
            self.save_config(trainer, pl_module, command)

    on_train_start = on_validation_start = on_test_start = on_predict_start = _save

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        kept, root = masked(self.config), home(trainer)
        checkpoint = kept.pop("ckpt_path")
        text = self.parser.dump(kept, skip_none=False)
        for folder in written_folders(trainer, cast(Any, trainer).datamodule, stage):
            path = root / f"{stage}.yaml" if folder == root else folder.with_name(f"{folder.name}.yaml")
            write_bytes(path, text.encode())
        shown = {**yaml.safe_load(text), "ckpt_path": checkpoint, **provenance(trainer)}
        told = json.dumps(shown, ensure_ascii=False, default=str)
        for end in ('"', "/"):
            told = told.replace(f'"{Path.home()}{end}', f'"~{end}')
        for logger in trainer.loggers:
            logger.log_hyperparams(json.loads(told))


def provenance(trainer: Trainer) -> dict[str, Any]:
    """Version and git state of this package, and the digest of each shard set's manifest."""
    manifests = getattr(getattr(trainer, "datamodule", None), "manifests", {})
    return {
        "code": {"version": version("featinv-pl"), **git_state(Path(__file__).parents[1])},
        "shards": {str(folder): seal(manifest) for folder, manifest in manifests.items()},
    }


def git_state(folder: Path) -> dict[str, Any]:
    """Commit of a folder under git, and whether its files differ from it; nothing where git knows none of them."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(folder), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if not git("ls-files", "."):  # an installed package may lie in the repository of something else
            return {}
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.CalledProcessError):
        return {}


class SavePretrained(Callback):
    """Saves a trained part at the end of `fit`, in the layout in which it is loaded, with `SHA256SUMS` of its files.

    A model that is there is replaced by a training that resumes (`ckpt_path`) alone, and nothing else ever.

    Args:
        folder: Where to, if not `model` below the run's folder.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse, before training, a folder that holds something; replacing it would lose that."""
        folder, replaced = self._places(trainer)
        if trainer.is_global_zero and replaced.exists() and not folder.exists():
            os.replace(replaced, folder)  # a kill between the two renames at the end of an earlier training
        trainer.strategy.barrier()
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return
        if not _is_saved(folder):
            raise UserError(
                f"`callbacks.folder`: '{folder}' holds what SavePretrained has not written, or what was changed since, "
                "so it is left as it is. Give another folder."
            )
        if trainer.ckpt_path is None:
            raise UserError(
                f"'{folder}' is the model of an earlier training, so it is left as it is. Remove it, give another "
                "folder (`default_root_dir`), or resume that training (`ckpt_path` last)."
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        folder, replaced = self._places(trainer)
        with atomic(folder) as partial:
            partial.mkdir()
            cast(Any, pl_module).save_pretrained(partial)
            write_sums(partial)
            remove(replaced)
            if folder.exists():
                os.replace(folder, replaced)
        remove(replaced)

    def _places(self, trainer: Trainer) -> tuple[Path, Path]:
        """Where the model goes, and where the one that it replaces is meanwhile."""
        folder = self.folder or Path(os.path.relpath(trainer.default_root_dir)) / MODEL
        folder = folder.resolve() if folder.is_symlink() else folder  # a link stays one
        return folder, folder.with_name(f".{folder.name}.replaced")


def _is_saved(folder: Path) -> bool:
    """Whether a folder holds nothing but what SavePretrained has written there, as it was."""
    files = {path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir()}
    others = [path for path in files if path.suffix not in SUMMED or any(part.startswith(".") for part in path.parts)]
    try:
        check_sums(folder, "")
    except UserError:
        return False
    return others == [Path(SUMS)]
