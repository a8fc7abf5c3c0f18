"""Atomic checkpoint writes, in the background, and the choice of the checkpoint to resume from."""

import math
import time
from collections.abc import Callable, Iterable
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from featinv_pl.errors import UserError, spelled
from featinv_pl.files import PARTIAL, atomic
from featinv_pl.nets.weights import check_archive, read_checkpoint
from featinv_pl.runtime.ranks import say

OPTION = "`ckpt_path`"
ABANDONED = 600.0  # seconds in which a living process writes at least something


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes checkpoints so that a kill, a full disk or a missing permission never costs one that is there.

    Lightning's own goes through the temporary folder, from which another file system gets a copy: a kill meanwhile
    leaves half a file under the final name.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if "://" in str(path):  # a store that shows an object when it is complete
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        try:
            for left in target.parent.glob(f"*.ckpt{PARTIAL}"):  # by killed runs
                if time.time() - left.stat().st_mtime > ABANDONED:  # another process may be writing right now
                    left.unlink(missing_ok=True)
            with atomic(target) as partial:
                with partial.open("wb") as file:  # torch's own hides what the file system says
                    torch.save(checkpoint, file)
                check_archive(partial)
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError | BadZipFile):  # torch's writer may hide it
                cause = cause.__cause__ or cause.__context__
            if cause is None:
                raise
            raise UserError(
                f"the checkpoint '{path}' could not be saved: {getattr(cause, 'strerror', None) or cause}. What was "
                f"there before is as it was. Make room or give another folder, and resume with {OPTION} last."
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(Path(path), OPTION)  # whatever was asked for: nothing in a checkpoint may run code


class BackgroundCheckpoints(AtomicCheckpoints):
    """Writes a checkpoint in a thread, from a copy of the state, while training goes on.

    There is one at a time, and none is removed before the one that replaces it is complete. An error is raised where
    training next looks (`settle`), which it does after each batch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.thread: ThreadPoolExecutor | None = None
        self.jobs: list[Future[None]] = []
        self.error: BaseException | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.settle()
        self._later(super().save_checkpoint, copied(checkpoint), path, storage_options)

    def remove_checkpoint(self, path: Any) -> None:
        self._later(super().remove_checkpoint, path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        self.settle()
        return super().load_checkpoint(path, map_location, weights_only)

    def settle(self, wait: bool = True) -> None:
        """Raise the error of what was to be written or removed; by default, wait until all of it is done."""
        if wait or all(job.done() for job in self.jobs):
            futures.wait(self.jobs)
            self.jobs, error, self.error = [], self.error, None
            if error is not None:
                raise error

    def teardown(self) -> None:
        try:
            self.settle()
        finally:
            if self.thread is not None:
                self.thread.shutdown()
                self.thread = None

    def _later(self, work: Callable[..., None], *given: Any) -> None:
        def run() -> None:
            if self.error is None:  # or what is there is all that there is
                try:
                    work(*given)
                except BaseException as error:
                    self.error = error

        self.thread = self.thread or ThreadPoolExecutor(1)  # not before, so that a run can be sent to other processes
        self.jobs.append(self.thread.submit(run))


def settle(trainer: Trainer, wait: bool = True) -> None:
    """See `BackgroundCheckpoints.settle`, if the trainer has such."""
    if isinstance(writer := trainer.strategy.checkpoint_io, BackgroundCheckpoints):
        writer.settle(wait)


def copied(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint with copies in memory of all its tensors: of a GPU's, in pages that it writes to by itself."""
    copies: dict[Any, Tensor] = {}

    def copy(one: Tensor) -> Tensor:
        same = one.data_ptr(), one.shape, one.stride(), one.dtype, one.device
        if same not in copies:
            pinned = one.device.type == "cuda"
            there = torch.empty_like(one, device="cpu", pin_memory=pinned, requires_grad=False)
            copies[same] = there.copy_(one.detach(), non_blocking=pinned)
        return copies[same]

    def walk(value: Any) -> Any:
        if isinstance(value, Tensor):
            return copy(value)
        if isinstance(value, dict):
            return {name: walk(one) for name, one in value.items()}
        return type(value)(map(walk, value)) if type(value) in (list, tuple) else value

    made: dict[str, Any] = walk(checkpoint)
    if any(device.type == "cuda" for *_, device in copies):
        torch.cuda.synchronize()
    return made


def find_checkpoint(given: str, run_folders: Callable[[], Iterable[Path]]) -> Path | None:
    """The checkpoint that `--ckpt_path` means: a file, a folder, or `last` or `best` of a run's folders.

    Of several, that of the latest step; where the right one is damaged, which is said, the next complete one. None
    without any.
    """
    path = Path(given)
    if given not in ("last", "best") and not path.is_dir():
        read_checkpoint(path, OPTION, map_location="meta")
        return path
    # Lightning puts them into a folder or `checkpoints` below it; deeper ones may belong to other trainings.
    folders = [path] if path.is_dir() else run_folders()
    found = {file for folder in folders for one in (folder, folder / "checkpoints") for file in one.glob("*.ckpt")}
    candidates = sorted(found, key=lambda file: (_step(file), file.stat().st_mtime_ns), reverse=True)
    if not candidates:
        return None
    chosen, state = _first_complete(candidates, given)
    if given == "best":  # according to the newest one, wherever its folder is now
        states = state.get("callbacks", {}).values()
        names = {Path(one["best_model_path"]).name for one in states if one.get("monitor")}
        if not names:
            raise UserError(
                f"{OPTION} best: no ModelCheckpoint of this run has a monitor. Give {OPTION} last, or a file."
            )
        chosen, _ = _first_complete([*(file for file in candidates if file.name in names), chosen], given)
    say(f"--ckpt_path {given}: '{chosen}'.")
    return chosen


def _step(path: Path) -> float:
    """The step that a checkpoint was written at; of one that cannot be read, the latest, so that it is named."""
    try:
        return int(torch.load(path, map_location="meta", weights_only=True, mmap=True)["global_step"])
    except Exception:  # a hostile file can raise anything
        return math.inf


def _first_complete(candidates: list[Path], given: str) -> tuple[Path, dict[str, Any]]:
    for path in candidates:
        try:
            return path, read_checkpoint(path, OPTION, map_location="meta")
        except UserError as error:
            say(spelled(str(error), ["--ckpt_path"]))
    raise UserError(
        f"{OPTION} {given}: none of {len(candidates)} checkpoints is complete. Give a folder that holds a good one, or "
        f"begin in a new folder without {OPTION}."
    )
