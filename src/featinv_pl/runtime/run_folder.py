"""The folder of a run: one process at a time uses it, and a single training."""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Trainer

from featinv_pl.errors import UserError
from featinv_pl.masking import masked
from featinv_pl.runtime.internals import savers
from featinv_pl.runtime.ranks import say

LOCK = ".featinv-pl.lock"


def home(trainer: Any) -> Path:
    """The one folder below which a run writes.

    Args:
        trainer: A Trainer, or its settings.

    Raises:
        UserError: It is an address, which would become a local folder of that name.
    """
    root = str(trainer.default_root_dir or ".")
    if "://" in root:
        raise UserError(
            f"`default_root_dir`: '{masked(root)}' is an address, and a run writes to a folder. Give one on this "
            "machine, and copy it afterwards."
        )
    return Path(root).expanduser()


def written_folders(trainer: Trainer, data: Any, command: str) -> list[Path]:
    """The folders that a command writes to.

    An extraction writes to those of its unfinished shard sets alone, so that several may share a root.

    Args:
        trainer: With its callbacks.
        data: The data module.
        command: `fit`, `validate`, `test` or `predict`.
    """
    writers = [one for one in cast(Any, trainer).callbacks if hasattr(one, "unfinished_folders")]
    if command != "predict" or not writers:
        return [home(trainer)]
    return [folder for writer in writers for folder in writer.unfinished_folders(home(trainer), data)]


def configuration_path(trainer: Trainer, folder: Path, command: str) -> Path:
    """Where the configuration of a command is saved that writes to a folder: a shard set has its own beside it."""
    return folder / f"{command}.yaml" if folder == home(trainer) else folder.with_name(f"{folder.name}.yaml")


def refuse_used(trainer: Trainer, resumed: str | None) -> None:
    """Refuse to train where another training has left its checkpoints, which would be replaced or confused.

    Args:
        trainer: With its callbacks.
        resumed: The checkpoint to resume from, if any: `hpc`, or a file.

    Raises:
        UserError: The folder holds a checkpoint, and `resumed` does not lie beside it.
    """
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
    """Keep other processes out of a folder.

    By a lock of the kernel, which ends with this process in whatever way that ends, and which forked processes do not
    inherit: a worker that outlives its run does not block the next.

    Raises:
        UserError: Another process has claimed it, or it is not a folder and cannot become one.
    """
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"`default_root_dir`: '{folder}' cannot be a folder ({error.strerror}). Give another one."
        ) from error
    with _lock(folder / LOCK) as file:
        try:
            file.truncate(0)
            file.write(f"{os.getpid()} {socket.gethostname()}")
            file.flush()
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)
            if new:
                with suppress(OSError):  # it is not empty: something was written
                    folder.rmdir()


def _lock(path: Path) -> IO[str]:
    """Open a file and lock it."""
    while True:
        file = path.open("a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(_in_use(path.parent, file)) from error
            say(f"'{path.parent}' cannot be locked ({error.strerror}), so start no second run there.")
            return file
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # its last owner has removed it meanwhile


def _in_use(folder: Path, file: IO[str]) -> str:
    file.seek(0)
    number, _, machine = file.read().partition(" ")
    file.close()
    where = f" on {machine}" if machine != socket.gethostname() else ""
    return (
        f"'{folder}' is in use: process {number}{where} is writing there. Wait until it has ended, or give another "
        "folder (`default_root_dir`)."
    )
