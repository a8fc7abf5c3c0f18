"""The folder of a run: one process at a time uses it, and a single training."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from filelock import FileLock, Timeout
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Trainer

from featinv_pl.errors import UserError
from featinv_pl.masking import masked
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
