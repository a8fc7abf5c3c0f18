"""Kills processes while they save checkpoints, and counts the broken ones: `make torture-checkpoints`.

Lightning's own way of saving is measured beside ours, with its temporary folder in memory as on many machines, so that
it is on another file system than the checkpoint.
"""

import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO, TorchCheckpointIO

from featinv_pl.callbacks.checkpoints import WholeCheckpoints
from featinv_pl.errors import UserError
from featinv_pl.nets.sources import read_checkpoint

MEMORY = Path("/dev/shm")
VALUES = 10_000_000  # of four bytes
KILLS = 40


def checkpoint(step: int) -> dict[str, Any]:
    return {"state_dict": {"weight": torch.full((VALUES,), float(step))}, "global_step": step}


def kill_while_saving(how: CheckpointIO, path: Path, kills: int) -> tuple[int, int]:
    """Kill that many processes at moments spread over their first saves.

    Returns:
        How many left a broken checkpoint under its name, and how many were in the middle of saving.
    """
    start = time.perf_counter()
    how.save_checkpoint(checkpoint(0), path)
    duration = time.perf_counter() - start
    broken = interrupted = 0
    for kill in range(kills):
        before = path.stat().st_mtime_ns
        child = os.fork()
        if child == 0:
            for step in range(1, 1000):
                how.save_checkpoint(checkpoint(step), path)
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
            how.save_checkpoint(checkpoint(0), path)
    return broken, interrupted


def seconds(how: CheckpointIO, path: Path) -> float:
    """The median of five saves."""
    durations = []
    for step in range(5):
        state = checkpoint(step)
        start = time.perf_counter()
        how.save_checkpoint(state, path)
        durations.append(time.perf_counter() - start)
    return sorted(durations)[2]


def main() -> None:
    torch.set_num_threads(1)
    print("| saved by | broken checkpoints | of kills | seconds for 40 MB |")
    print("|---|---|---|---|")
    for name, how in (("Lightning", TorchCheckpointIO()), ("this project", WholeCheckpoints())):
        with tempfile.TemporaryDirectory(dir=".") as folder, tempfile.TemporaryDirectory(dir=MEMORY) as temporary:
            tempfile.tempdir = temporary  # where Lightning's file waits for its name
            path = Path(folder).absolute() / "a.ckpt"
            broken, _ = kill_while_saving(how, path, KILLS)
            print(f"| {name} | {broken} | {KILLS} | {seconds(how, path):.2f} |")
            tempfile.tempdir = None


if __name__ == "__main__":
    main()
