"""SIGKILL while a large checkpoint is being saved: Lightning's own way of saving, and this project's.

The temporary folder is in memory as on many machines, so that it is on another file system than the checkpoint.
"""

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from lightning.pytorch.plugins.io import CheckpointIO, TorchCheckpointIO

from featinv_pl.errors import UserError
from featinv_pl.nets.weights import read_checkpoint
from featinv_pl.runtime.checkpoints import AtomicCheckpoints
from torture import Figure

VALUES = 10_000_000  # of four bytes


def save(how: CheckpointIO, path: Path, step: int) -> None:
    state = {"weight": torch.full((VALUES,), float(step))}
    how.save_checkpoint({"state_dict": state, "global_step": step}, path)


def kill_while_saving(how: CheckpointIO, path: Path, kills: int) -> tuple[int, int]:
    """Kill processes that save: how many left a broken checkpoint under its name, and how many were within a save."""
    start = time.perf_counter()
    save(how, path, 0)
    duration = time.perf_counter() - start
    broken = interrupted = 0
    for kill in range(kills):
        before = path.stat().st_mtime_ns
        child = os.fork()
        if child == 0:
            for step in range(1, 1000):
                save(how, path, step)
            os._exit(0)
        time.sleep(duration * (1 + 3 * kill / kills))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        interrupted += any(path.parent.glob("*.partial")) or path.stat().st_mtime_ns == before
        try:
            found = read_checkpoint(path, "--ckpt_path")
            broken += not bool((found["state_dict"]["weight"] == found["global_step"]).all())
        except UserError:
            broken += 1
            save(how, path, 0)
    return broken, interrupted


def kill_saving(kills: int) -> Iterator[Figure]:
    """Both ways of saving."""
    for name, how in (("Lightning", TorchCheckpointIO()), ("this project", AtomicCheckpoints())):
        with tempfile.TemporaryDirectory(dir=".") as folder, tempfile.TemporaryDirectory(dir="/dev/shm") as temporary:
            tempfile.tempdir = temporary  # where Lightning's file waits for its name
            broken, interrupted = kill_while_saving(how, Path(folder).absolute() / "a.ckpt", kills)
            tempfile.tempdir = None
        note = f"{interrupted} in the middle of it" if interrupted else ""  # Lightning's leaves nothing to tell by
        yield Figure("saving 40 MB", f"kill -9, saved by {name}", kills, broken, note)
