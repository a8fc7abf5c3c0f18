"""Runs do not touch each other: one folder each, for one process and one training."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from featinv_pl.__main__ import main
from featinv_pl.runtime.run_folder import claim
from interrupts import checkpoint, eventually, stopped
from test_cli import files, refused
from tiny import extraction, write


def test_a_run_lies_below_its_folder_alone(settings: dict[str, Any]) -> None:
    settings["trainer"]["logger"] = {"class_path": "WandbLogger", "init_args": {"project": "featinv-pl"}}
    args = ["fit", "--config", write(Path("fit.yaml"), settings), "--trainer.max_steps=1"]
    before = set(Path().iterdir())
    main([*args, "--trainer.default_root_dir=one"])
    assert set(Path().iterdir()) - before == {Path("one")}
    assert sorted(path.name for path in Path("one").iterdir()) == ["fit.yaml", "inversion.ckpt", "wandb"]
    # What it has saved of itself does not lead another run there.
    first = files(Path("one"))
    main(["fit", "--config", "one/fit.yaml", "--trainer.default_root_dir=two"])
    assert sorted(path.name for path in Path("two").iterdir()) == ["fit.yaml", "inversion.ckpt", "wandb"]
    assert files(Path("one")) == first


def test_a_folder_with_a_checkpoint_is_refused(fit: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main([*fit, "--trainer.max_steps=2"])
    before = files(Path("run"))
    Path("other").mkdir()
    Path("other/inversion.ckpt").write_bytes(Path("run/inversion.ckpt").read_bytes())
    for options in ([], ["--ckpt_path=other/inversion.ckpt"]):  # nor may one that continues another training
        code, line = stopped([*fit, *options], capsys)
        assert code == 1
        assert "'run/inversion.ckpt' is the checkpoint of an earlier training" in line
        assert "Resume that one with --ckpt_path last" in line
        assert files(Path("run")) == before


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


def test_a_folder_in_use_is_refused(fit: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with claimed_by_another("run") as other:
        for command in (fit, ["test", *fit[1:]]):
            refused(command, capsys, f"'run' is in use: process {other} is writing there")
        assert sorted(os.listdir("run")) == [".featinv-pl.lock"]
    main([*fit, "--trainer.max_steps=1"])  # a lock does not outlive its process
    assert sorted(os.listdir("run")) == ["fit.yaml", "inversion.ckpt"]


def test_a_claim_is_not_inherited_and_leaves_nothing() -> None:
    with claim(Path("run")):
        if (child := os.fork()) == 0:
            try:
                with claim(Path("run")):
                    os._exit(1)
            except ValueError:
                os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    assert not Path("run").exists()


def test_extractions_share_a_folder_but_no_set(
    classifier_folder: Path, prior_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def args(*sources: str) -> list[str]:
        return ["predict", "--config", write(Path("e.yaml"), extraction(classifier_folder, prior_folder, [*sources]))]

    with claimed_by_another("shards/val") as other:
        refused(args("train", "val"), capsys, f"'shards/val' is in use: process {other} is writing there")
        main(args("clean"))
    main(args("train", "val"))
    for source in ("train", "val", "clean"):  # how each was made is not what the last one was made by
        assert source in yaml.safe_load(Path(f"shards/{source}.yaml").read_text())["data"]["init_args"]["sources"]
        assert not Path(f"shards/{source}/.featinv-pl.lock").exists()


def test_what_is_saved_of_a_run_continues_none(fit: list[str]) -> None:
    main([*fit, "--trainer.max_steps=2"])
    main([*fit, "--ckpt_path=last"])
    main(["validate", *fit[1:], "--ckpt_path=last"])
    for name in ("fit", "validate"):
        assert "ckpt_path" not in yaml.safe_load(Path(f"run/{name}.yaml").read_text())
    main(["fit", "--config", "run/fit.yaml", "--trainer.default_root_dir=new", "--seed_everything=1"])
    one, other = (checkpoint(f"{folder}/inversion.ckpt") for folder in ("run", "new"))
    assert other["global_step"] == 5
    assert not all(torch.equal(one["state_dict"][name], other["state_dict"][name]) for name in one["state_dict"])
