"""Atomic checkpoint writes, and the choice of the checkpoint to resume from."""

import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

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
        """Save, or leave what is there as it is.

        Raises:
            UserError: The file system refuses, for instance because it is full.
        """
        if "://" in str(path):  # a store that shows an object when it is complete
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        try:
            _sweep(target.parent)
            with atomic(target) as partial:
                with partial.open("wb") as file:  # torch's own hides what the file system says
                    torch.save(checkpoint, file)
                check_archive(partial)
        except Exception as error:
            if (refusal := _refusal(error)) is None:
                raise
            raise UserError(
                f"the checkpoint '{path}' could not be saved: {refusal}. What was there before is as it was. "
                f"Make room or give another folder, and resume with {OPTION} last."
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Load tensors and plain values, whatever was asked for: nothing in a checkpoint may run code."""
        return read_checkpoint(Path(path), OPTION)


def _sweep(folder: Path) -> None:
    """Remove what killed runs have left of checkpoints that never were."""
    for path in folder.glob(f"*.ckpt{PARTIAL}"):
        if time.time() - path.stat().st_mtime > ABANDONED:  # another process may be writing right now
            path.unlink(missing_ok=True)


def _refusal(error: BaseException | None) -> str | None:
    """The file system's own words, which torch's writer may hide behind an error of its own."""
    while error is not None:
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        if isinstance(error, BadZipFile):
            return str(error)
        error = error.__cause__ or error.__context__
    return None


def find_checkpoint(given: str, places: Callable[[], Iterable[Path]]) -> Path | None:
    """The checkpoint that `--ckpt_path` means.

    Args:
        given: A file, a folder, `last` or `best`.
        places: Where the run keeps its checkpoints, for the two words: folders and files.

    Returns:
        A complete file. Of several it is that of the latest step, whatever the times of the files; where the
        right one is damaged, which is said, the next. None if there is none at all.
    """
    path = Path(given)
    if given not in ("last", "best") and not path.is_dir():
        _check(path)
        return path
    found = {file for place in ([path] if path.is_dir() else places()) for file in _checkpoints(place)}
    candidates = sorted(found, key=lambda file: (_step(file), file.stat().st_mtime_ns), reverse=True)
    if not candidates:
        return None
    chosen = newest = _first_complete(candidates, given)
    if given == "best":
        chosen = _first_complete([*_best(newest, candidates), newest], given)
    say(f"--ckpt_path {given}: '{chosen}'.")
    return chosen


def _checkpoints(place: Path) -> list[Path]:
    """Checkpoints in a folder or where Lightning puts them below it; deeper ones may belong to other trainings."""
    return [place] if place.is_file() else [*place.glob("*.ckpt"), *place.glob("checkpoints/*.ckpt")]


def _step(path: Path) -> float:
    """The step that a checkpoint was written at; of one that cannot be read, the latest, so that it is named."""
    try:
        return int(torch.load(path, map_location="meta", weights_only=True, mmap=True)["global_step"])
    except Exception:  # a hostile file can raise anything
        return math.inf


def _first_complete(candidates: list[Path], given: str) -> Path:
    for path in candidates:
        try:
            _check(path)
        except UserError as error:
            say(spelled(str(error), ["--ckpt_path"]))
        else:
            return path
    raise UserError(
        f"{OPTION} {given}: none of {len(candidates)} checkpoints is complete. Give a folder that holds a good one, or "
        f"begin in a new folder without {OPTION}."
    )


def _best(newest: Path, candidates: list[Path]) -> list[Path]:
    """The best checkpoint according to the newest one, wherever its folder is now."""
    states = read_checkpoint(newest, OPTION, map_location="meta").get("callbacks", {}).values()
    names = {Path(state["best_model_path"]).name for state in states if state.get("monitor")}
    if not names:
        raise UserError(f"{OPTION} best: no ModelCheckpoint of this run has a monitor. Give {OPTION} last, or a file.")
    return [path for path in candidates if path.name in names]


def _check(path: Path) -> None:
    read_checkpoint(path, OPTION, map_location="meta")
