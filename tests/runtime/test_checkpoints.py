"""Checkpoints survive kills, full disks and damage, and never run code."""

import os
import resource
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Runs
from featinv_pl.errors import UserError
from featinv_pl.runtime.checkpoints import ABANDONED, AtomicCheckpoints, find_checkpoint
from torture.saving import kill_while_saving

CHECKPOINT: dict[str, Any] = {
    "state_dict": {"weight": torch.arange(300.0).view(3, 100), "bias": torch.ones(5)},
    "global_step": 7,
    "callbacks": {"ModelCheckpoint{}": {"monitor": None, "best_model_path": "elsewhere/a.ckpt"}},
}


def save(path: Path, step: int = 7, **more: Any) -> Path:
    AtomicCheckpoints().save_checkpoint({**CHECKPOINT, "global_step": step, **more}, path)
    os.utime(path, (step, step))
    return path


@pytest.mark.parametrize("contents", [[1, 2], {"state_dict": Runs(Path("ran"))}])
def test_what_is_no_checkpoint_is_refused_and_never_run(contents: Any, tmp_path: Path) -> None:
    torch.save(contents, tmp_path / "evil.ckpt")
    with pytest.raises(UserError, match=r"`ckpt_path`: '.*evil.ckpt' is"):
        AtomicCheckpoints().load_checkpoint(tmp_path / "evil.ckpt", weights_only=False)
    assert not Path("ran").exists()


def test_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    path = save(tmp_path / "a.ckpt")
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"a\.ckpt' could not be saved: File too large\. What was there before"):
            save(path, 8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.ckpt"]


def test_a_folder_that_cannot_be_is_reported_and_a_mistake_is_not(tmp_path: Path) -> None:
    with pytest.raises(AttributeError, match="local object"):
        save(tmp_path / "a.ckpt", more=lambda: None)
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"could not be saved: (File exists|Not a directory)"):
        save(tmp_path / "file/a.ckpt")


def test_remote_stores_are_left_to_lightning() -> None:
    AtomicCheckpoints().save_checkpoint(CHECKPOINT, "memory://folder/a.ckpt")
    assert not Path("memory:").exists()


def test_killed_while_saving(tmp_path: Path) -> None:
    """Processes are killed at moments spread over the saving of 40 MB: no checkpoint is ever broken."""
    broken, interrupted = kill_while_saving(AtomicCheckpoints(), tmp_path / "a.ckpt", 3)
    assert broken == 0
    assert interrupted  # or nothing was tested
    save(tmp_path / "a.ckpt")
    assert os.listdir(tmp_path) == ["a.ckpt"]


def test_leftovers_are_swept_up(tmp_path: Path) -> None:
    for name, age in (("old", ABANDONED + 60), ("young", 0.0)):
        partial = tmp_path / f"{name}.ckpt.partial"
        partial.touch()
        os.utime(partial, (time.time() - age,) * 2)
    save(tmp_path / "a.ckpt")
    assert sorted(os.listdir(tmp_path)) == ["a.ckpt", "young.ckpt.partial"]


def test_the_newest_complete_one_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    folders: Any = partial(list, [tmp_path])
    assert find_checkpoint("last", folders) is None
    steps = [save(tmp_path / f"step={step}.ckpt", step) for step in (1, 2, 10)]
    assert find_checkpoint("last", folders) == find_checkpoint(str(tmp_path), list) == steps[2]
    assert find_checkpoint(str(steps[0]), list) == steps[0]

    for ahead in steps:  # copied, or by a clock that is wrong: the step counts
        times = {path: 99.0 + (path == ahead) for path in steps}
        for path, moment in times.items():
            os.utime(path, (moment, moment))
        assert find_checkpoint("last", folders) == steps[2]

    steps[2].write_bytes(steps[2].read_bytes()[:100])
    os.utime(steps[2], (10, 10))
    caplog.clear()
    assert find_checkpoint("last", folders) == steps[1]
    first, second = caplog.messages
    assert f"--ckpt_path: '{steps[2]}' is damaged" in first
    assert second == f"--ckpt_path last: '{steps[1]}'."

    for path in steps:
        path.write_bytes(b"")
    with pytest.raises(UserError, match="`ckpt_path` last: none of 3 checkpoints is complete"):
        find_checkpoint("last", folders)


def test_the_best_is_found_wherever_the_run_is_now(tmp_path: Path) -> None:
    folders: Any = partial(list, [tmp_path / "run"])
    save(tmp_path / "run/checkpoints/last.ckpt", 1)
    with pytest.raises(UserError, match="`ckpt_path` best: no ModelCheckpoint of this run has a monitor"):
        find_checkpoint("best", folders)
    states = {"ModelCheckpoint{}": {"monitor": "val/cosine", "best_model_path": "/once/best.ckpt"}}
    best = save(tmp_path / "run/checkpoints/best.ckpt", 2)
    last = save(tmp_path / "run/checkpoints/last.ckpt", 3, callbacks=states)
    assert find_checkpoint("best", folders) == best
    best.write_bytes(b"")
    assert find_checkpoint("best", folders) == last
