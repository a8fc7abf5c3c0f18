"""Runs do not touch each other: one folder each, for one process and one training."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from featinv_pl.__main__ import main
from featinv_pl.runtime.saving import claim
from interrupts import Capture, checkpoint, eventually
from test_cli import files, refused
from tiny import extraction, write


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
