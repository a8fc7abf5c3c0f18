"""Checkpoints survive kills, full disks and damage; a run folder is for one process and one training."""

import contextlib
import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import yaml

from featinv_pl.__main__ import main
from featinv_pl.errors import UserError
from featinv_pl.runtime import checkpoints
from featinv_pl.runtime.checkpoints import ABANDONED, AtomicCheckpoints, BackgroundCheckpoints, find_checkpoint
from featinv_pl.runtime.saving import claim
from interrupts import Capture, checkpoint, eventually
from test_cli import files, refused
from tiny import extraction, write
from torture.kills import kill_while_saving

CHECKPOINT: dict[str, Any] = {
    "state_dict": {"weight": torch.arange(300.0).view(3, 100), "bias": torch.ones(5)},
    "global_step": 7,
    "callbacks": {"ModelCheckpoint{}": {"monitor": None, "best_model_path": "elsewhere/a.ckpt"}},
}


def save(path: Path, step: int = 7, **more: Any) -> Path:
    AtomicCheckpoints().save_checkpoint({**CHECKPOINT, "global_step": step, **more}, path)
    os.utime(path, (step, step))
    return path


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go, begun, check = threading.Event(), threading.Event(), cast(Any, checkpoints).check_archive

    def wait(path: Path) -> None:
        begun.set()
        assert go.wait(60)
        check(path)

    monkeypatch.setattr(checkpoints, "check_archive", wait)
    io, weight, old, new = BackgroundCheckpoints(), torch.zeros(3), tmp_path / "old.ckpt", tmp_path / "new.ckpt"
    old.touch()
    state: Any = {"state_dict": {"weight": weight, "same": weight}, "best": {"k": [1]}, "global_step": 8}
    io.save_checkpoint(state, new)
    io.remove_checkpoint(old)
    assert begun.wait(60)
    weight += 1  # the next step
    state["best"]["k"].append(2)
    io.settle(wait=False)
    assert old.exists()
    assert not new.exists()
    go.set()
    io.settle()
    found = torch.load(new, weights_only=True)
    assert found["state_dict"]["weight"].tolist() == [0, 0, 0]
    assert found["state_dict"]["weight"].data_ptr() == found["state_dict"]["same"].data_ptr()
    assert found["best"] == {"k": [1]}
    assert os.listdir(tmp_path) == ["new.ckpt"]

    io.save_checkpoint({"global_step": 9}, new / "impossible.ckpt")
    io.remove_checkpoint(new)
    with pytest.raises(UserError, match=r"could not be saved: (File exists|Not a directory)"):
        io.save_checkpoint({"global_step": 10}, new)
    assert torch.load(new, weights_only=True)["global_step"] == 8  # of a failure nothing is removed
    io.save_checkpoint({**CHECKPOINT, "global_step": 11}, new)
    io.teardown()
    assert io.load_checkpoint(new)["global_step"] == 11


def test_what_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = save(tmp_path / "a.ckpt")
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"a\.ckpt' could not be saved: File too large\. What was there before"):
            save(path, 8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with pytest.raises(AttributeError, match="local object"):  # a mistake is not reported as one of the disk
        save(path, more=lambda: None)
    with pytest.raises(UserError, match=r"could not be saved: (File exists|Not a directory)"):
        save(path / "b.ckpt")
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.ckpt"]


class InBackground(AtomicCheckpoints):
    """Saves by threads of each process."""

    own: tuple[int, BackgroundCheckpoints] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if first := self.own is None or self.own[0] != os.getpid():
            self.own = os.getpid(), BackgroundCheckpoints()
        self.own[1].save_checkpoint(checkpoint, path, storage_options)
        if first:
            self.own[1].settle()


@pytest.mark.parametrize("how", [AtomicCheckpoints(), InBackground()])
def test_killed_while_saving(how: AtomicCheckpoints, tmp_path: Path) -> None:
    """Processes are killed at moments spread over the saving of 40 MB: no checkpoint is ever broken."""
    broken, interrupted = kill_while_saving(how, tmp_path / "a.ckpt", 3)
    assert broken == 0
    assert interrupted  # or nothing was tested
    old, young = tmp_path / "old.ckpt.partial", tmp_path / "young.ckpt.partial"
    for leftover, age in ((old, ABANDONED + 60), (young, 0.0)):
        leftover.touch()
        os.utime(leftover, (time.time() - age,) * 2)
    save(tmp_path / "a.ckpt")
    assert {*tmp_path.iterdir()} == {tmp_path / "a.ckpt", young}


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


def test_a_run_lies_below_its_folder_alone_and_does_not_lead_others_there(settings: dict[str, Any]) -> None:
    args = ["--config", write(Path("fit.yaml"), settings), "--trainer.default_root_dir=one"]
    before = set(Path().iterdir())
    main(["fit", *args, "--trainer.max_steps=1"])
    assert set(Path().iterdir()) - before == {Path("one")}
    assert sorted(path.name for path in Path("one").iterdir()) == ["fit.yaml", "inversion.ckpt"]
    main(["fit", *args, "--ckpt_path=last", "--trainer.max_steps=2"])
    assert "ckpt_path" not in yaml.safe_load(Path("one/fit.yaml").read_text())
    first = files(Path("one"))
    main(["fit", "--config", "one/fit.yaml", "--trainer.default_root_dir=two", "--trainer.max_steps=1"])
    assert sorted(path.name for path in Path("two").iterdir()) == ["fit.yaml", "inversion.ckpt"]
    assert checkpoint("two/inversion.ckpt")["global_step"] == 1  # from its beginning
    assert files(Path("one")) == first


def test_a_folder_with_a_checkpoint_is_refused(fit: list[str], uninterrupted_run: Path, capsys: Capture) -> None:
    before = files(uninterrupted_run)
    Path("inversion.ckpt").write_bytes((uninterrupted_run / "inversion.ckpt").read_bytes())
    message = "inversion.ckpt' is the checkpoint of an earlier training", "Resume that one with --ckpt_path last"
    for options in ([], ["--ckpt_path=inversion.ckpt"]):  # nor may one that continues another training
        refused([*fit, f"--trainer.default_root_dir={uninterrupted_run}", *options], capsys, *message)
        assert files(uninterrupted_run) == before


@contextlib.contextmanager
def claimed_by_another(folder: str) -> Iterator[int]:
    """Have another process claim a folder, until it is killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(writing)
        with claim(Path(folder)):
            Path("claimed").touch()
            os.read(reading, 1)  # nobody writes; it ends with this process
    assert eventually(Path("claimed").exists)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(writing)


def test_a_folder_in_use_is_refused(fit: list[str], capsys: Capture) -> None:
    with claimed_by_another("run") as other:
        refused(fit, capsys, f"'run' is in use: process {other} is writing there")
        assert sorted(os.listdir("run")) == [".featinv-pl.lock"]
    with claim(Path("run")), pytest.raises(ValueError, match="in use"), claim(Path("run")):
        pass  # a lock does not outlive its process, and leaves nothing behind
    assert os.listdir("run") == []
    with claim(Path("new")):
        pass
    assert not Path("new").exists()


def test_extractions_share_a_folder_but_no_set(classifier_folder: Path, prior_folder: Path, capsys: Capture) -> None:
    def args(*sources: str) -> list[str]:
        return ["predict", "--config", write(Path("e.yaml"), extraction(classifier_folder, prior_folder, [*sources]))]

    with claimed_by_another("shards/val") as other:
        refused(args("train", "val"), capsys, f"'shards/val' is in use: process {other} is writing there")
        main(args("clean"))
    main(args("train", "val"))
    for source in ("train", "val", "clean"):  # how each was made is not what the last one was made by
        assert source in yaml.safe_load(Path(f"shards/{source}.yaml").read_text())["data"]["init_args"]["sources"]
        assert not Path(f"shards/{source}/.featinv-pl.lock").exists()
