"""Training that loses no work: every end is saved, and the same command goes on as if nothing had been."""

import contextlib
import csv
import json
import multiprocessing
import os
import pty
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from featinv_pl.__main__ import main
from test_cli import refused
from tiny import extraction, inversion, write
from torture.processes import start
from torture.ranks import group

ROOT = Path(__file__).parents[1]
STEPS = 5  # of epochs of three


class Interrupt(Callback):
    """Sends this process a signal.

    Args:
        number: Of the signal.
        step: After which.
        validating: Whether while this step is being validated.
    """

    def __init__(self, number: int, step: int, validating: bool = False) -> None:
        self.number, self.step, self.validating = number, step, validating

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step and not self.validating and trainer.global_rank == trainer.world_size - 1:
            os.kill(os.getpid(), self.number)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step and self.validating:
            os.kill(os.getpid(), self.number)

    def on_predict_batch_end(self, trainer: Trainer, *args: Any) -> None:
        os.kill(os.getpid(), self.number)


class InterruptGroup(Callback):
    """Has another process send this one's group a signal after step 3, as a terminal, `timeout` or a scheduler does.

    Args:
        number: Of the signal.
    """

    def __init__(self, number: int) -> None:
        self.number = number

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == 3:
            assert multiprocessing.active_children(), "the loader has no workers"
            subprocess.run(["kill", f"-{self.number}", "--", f"-{os.getpgrp()}"], check=False)


class LoseWorker(Callback):
    """Kills a worker, as the kernel does where memory is short."""

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == 1:
            multiprocessing.active_children()[0].kill()


class Sent(Callback):
    """Pickles the run as `ddp_spawn` does."""

    bytes: ClassVar[int] = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        Sent.bytes = len(ForkingPickler.dumps((trainer, pl_module)))


class Validated(Callback):
    """Notes the samples that each validation sees."""

    keys: ClassVar[dict[int, list[str]]] = {}

    def on_validation_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self.keys.setdefault(trainer.global_step, []).extend(batch["key"])


class Impatient(Callback):
    """Presses Ctrl-C twice within one batch."""

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)


class Spoil(Callback):
    """Makes a number of something infinite or none, at step 3.

    Args:
        what: `loss`, `gradient` or `weight`.
    """

    def __init__(self, what: str) -> None:
        self.what = what

    def on_before_backward(self, trainer: Trainer, module: LightningModule, loss: Tensor) -> None:
        if trainer.global_step == 3 and self.what == "loss":
            loss.data.fill_(torch.inf)

    def on_after_backward(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.global_step == 3 and self.what == "gradient":
            next(one.grad for one in module.parameters() if one.grad is not None).view(-1)[0] = torch.nan

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        if trainer.global_step == 4 and self.what == "weight":
            next(one for one in module.parameters() if one.requires_grad).data.view(-1)[0] = torch.inf


class SpoilNext(Callback):
    """Makes every loss none."""

    def on_before_backward(self, trainer: Trainer, module: LightningModule, loss: Tensor) -> None:
        loss.data.fill_(torch.nan)


class FullDisk(Callback):
    """Allows no file of more than 10 kB, from step 3 on."""

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.fixture(scope="session")
def trained_on(tmp_path_factory: pytest.TempPathFactory, classifier_folder: Path, prior_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("reliable")
    settings = extraction(classifier_folder, prior_folder, ["train", "val"])
    settings["trainer"] |= {"default_root_dir": str(folder)}
    settings["trainer"]["callbacks"][0]["init_args"]["folder"] = str(folder / "shards")
    main(["predict", "--config", write(folder / "extract.yaml", settings)])
    return folder / "shards"


@pytest.fixture
def settings(trained_on: Path, classifier_folder: Path, prior_folder: Path) -> dict[str, Any]:
    """Five steps, of which every second is saved and validated."""
    settings = inversion(classifier_folder, prior_folder, trained_on)
    saver = {"filename": "inversion", "every_n_train_steps": 2, "enable_version_counter": False}
    settings["trainer"] |= {
        "max_steps": STEPS,
        "check_val_every_n_epoch": None,
        "enable_progress_bar": False,
        "callbacks": [
            {"class_path": "MovingAverage", "init_args": {"decay": 0.5}},
            {"class_path": "ModelCheckpoint", "init_args": saver},
        ],
    }
    settings["data"]["init_args"] |= {"batch_size": 16, "test": {}}
    return settings


def added(name: str, **arguments: Any) -> list[str]:
    """Options that add a callback of this module."""
    options = [f"--trainer.callbacks+={__name__}.{name}"]
    return options + [f"--trainer.callbacks.{key}={value}" for key, value in arguments.items()]


def weights(path: str = "run/inversion.ckpt") -> dict[str, Tensor]:
    """All that a checkpoint holds of weights, their average and the optimizer."""
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["global_step"] == STEPS
    moments = checkpoint["optimizer_states"][0]["state"]
    return {
        **checkpoint["current_model_state"],
        **{f"average {name}": value for name, value in checkpoint["state_dict"].items()},
        **{f"{name} {key}": value for name, state in moments.items() for key, value in state.items()},
    }


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def stopped(args: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int | str | None, str]:
    """The exit status of a command that does not come to its end, and its last line."""
    with pytest.raises(SystemExit) as caught:
        main(args)
    return caught.value.code, capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("number", "step", "validating"),
    [(signal.SIGTERM, 1, False), (signal.SIGINT, 3, False), (signal.SIGTERM, 4, False), (signal.SIGINT, 2, True)],
)
def test_goes_on_after_a_signal(
    number: signal.Signals, step: int, validating: bool, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["fit", "--config", write(Path("fit.yaml"), settings), "--ckpt_path=last", *added("Validated")]
    Validated.keys.clear()
    main(args)  # which has nothing to go on from
    whole, validated = weights(), dict(Validated.keys)
    Path("run").rename("whole")

    Validated.keys.clear()
    code, line = stopped([*args, *added("Interrupt", number=int(number), step=step, validating=validating)], capsys)
    assert code == 128 + number
    assert line == (
        f"featinv-pl: stopped by {number.name}; step {step} is saved. "
        "Go on: the same command with --ckpt_path run/inversion.ckpt"
    )
    Validated.keys.clear()
    main(args)
    assert "--ckpt_path last: going on from 'run/inversion.ckpt'" in capsys.readouterr().err
    assert_same(weights(), whole)
    # A validation that was to come, or under way, is held from its first sample on.
    assert Validated.keys == {key: value for key, value in validated.items() if key >= step}
    assert sorted(path.name for path in Path("run").iterdir()) == ["fit.yaml", "inversion.ckpt"]


def eventually(check: Callable[[], bool]) -> bool:
    for _ in range(3000):
        if check():
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_workers_leave_a_signal_for_the_group_to_the_run(number: signal.Signals, settings: dict[str, Any]) -> None:
    settings["data"]["init_args"]["num_workers"] = 2
    args = ["fit", "--config", write(Path("fit.yaml"), settings), *added("InterruptGroup", number=int(number))]
    child = start(args, Path())
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + number, Path("output.txt").read_text()
    assert f"stopped by {number.name}; step 3 is saved." in Path("output.txt").read_text()
    assert torch.load("run/inversion.ckpt", weights_only=True)["global_step"] == 3
    assert eventually(lambda: not group(child))


def test_workers_end_with_a_run_that_is_killed(settings: dict[str, Any]) -> None:
    settings["data"]["init_args"]["num_workers"] = 2
    settings["trainer"]["max_steps"] = 100_000
    child = start(["fit", "--config", write(Path("fit.yaml"), settings)], Path())
    assert eventually(lambda: Path("run/inversion.ckpt").is_file())
    assert eventually(lambda: len(group(child)) == 5)  # the run, its server, what tracks resources, and two workers
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert eventually(lambda: not group(child))


def test_a_worker_that_dies_is_one_line(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    settings["data"]["init_args"]["num_workers"] = 1
    code, line = stopped(["fit", "--config", write(Path("fit.yaml"), settings), *added("LoseWorker")], capsys)
    assert code == 1
    assert line.startswith("featinv-pl: error: --data.num_workers: a worker has died (DataLoader worker (pid")
    assert "or enlarge /dev/shm" in line


def test_a_script_that_a_worker_would_run_again_is_told_so(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings["data"]["init_args"]["num_workers"] = 1
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)  # as a new worker says
    refused(["fit", "--config", write(Path("fit.yaml"), settings)], capsys, "below `if __name__ == '__main__':`")


def test_a_lost_terminal_saves_and_ends(settings: dict[str, Any]) -> None:
    settings["trainer"] |= {"max_steps": 100_000, "enable_progress_bar": True}
    settings["data"]["init_args"]["num_workers"] = 2
    args = ["fit", "--config", write(Path("fit.yaml"), settings)]
    child, terminal = pty.fork()
    if not child:
        code: Any = 1
        try:
            sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))  # not pytest's
            main(args)
        except SystemExit as stop:
            code = stop.code
        finally:
            os._exit(code)
    os.set_blocking(terminal, False)

    def saved() -> bool:
        with contextlib.suppress(BlockingIOError):
            os.read(terminal, 100_000)  # or the run would wait for its reader
        return Path("run/inversion.ckpt").is_file()

    assert eventually(saved)
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
    assert torch.load("run/inversion.ckpt", weights_only=True)["global_step"] >= 2


class Scontrol:
    """A stand-in for SLURM's command, which notes how it is called."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, status: int = 0) -> None:
        self.called = folder / "called"
        path = folder / "scontrol"
        path.write_text(f'#!/bin/sh\necho "$@" >> {self.called}\nexit {status}\n')
        path.chmod(0o755)
        monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
        job = {"NTASKS": 1, "NTASKS_PER_NODE": 1, "JOB_ID": 4242, "PROCID": 0, "LOCALID": 0, "NODEID": 0}
        for name, value in {**job, "JOB_NAME": "train", "NODELIST": "localhost"}.items():
            monkeypatch.setenv(f"SLURM_{name}", str(value))


@pytest.mark.parametrize(
    ("options", "number", "validating", "array"),
    [
        ([], signal.SIGUSR1, False, False),
        (["SLURMEnvironment", "--trainer.plugins.requeue_signal=SIGUSR2"], signal.SIGUSR2, True, True),
    ],
)
def test_slurm_starts_a_job_again(
    options: list[str],
    number: signal.Signals,
    validating: bool,
    array: bool,
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = ["fit", "--config", write(Path("fit.yaml"), settings)]
    main(args)
    whole = weights()
    Path("run").rename("whole")

    scontrol = Scontrol(tmp_path, monkeypatch)
    if array:
        monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "41")
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")
    if options:
        args += [f"--trainer.plugins+=lightning.pytorch.plugins.environments.{options[0]}", *options[1:]]
    step = 2 if validating else 3
    code, line = stopped([*args, *added("Interrupt", number=int(number), step=step, validating=validating)], capsys)
    job = "41_7" if array else "4242"
    assert code == 128 + number
    assert line == (
        f"featinv-pl: stopped by {number.name}; step {step} is saved. Go on: the same command with --ckpt_path "
        f"run/hpc_ckpt_1.ckpt (SLURM does that: job {job} is requeued)"
    )
    assert scontrol.called.read_text() == f"requeue {job}\n"
    main(args)  # Lightning finds what was saved
    assert_same(weights(), whole)


def test_slurm_may_refuse_and_may_send_sigterm_too(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["fit", "--config", write(Path("fit.yaml"), settings)]
    Scontrol(tmp_path, monkeypatch, status=1)
    both = [*added("Interrupt", number=int(signal.SIGUSR1), step=3), *added("Interrupt", number=15, step=3)]
    code, line = stopped([*args, *both], capsys)
    assert code == 128 + signal.SIGUSR1
    assert line.endswith("--ckpt_path run/hpc_ckpt_1.ckpt (scontrol requeue has failed)")
    (tmp_path / "scontrol").unlink()
    _, line = stopped([*args, "--ckpt_path=last", *added("Interrupt", number=int(signal.SIGUSR1), step=4)], capsys)
    assert line.endswith(
        "step 4 is saved. Go on: the same command with --ckpt_path run/hpc_ckpt_2.ckpt (scontrol requeue has failed)"
    )
    code, line = stopped([*args, "--ckpt_path=hpc", *added("Interrupt", number=15, step=5)], capsys)
    assert (code, line.split(" Go on")[0]) == (143, "featinv-pl: stopped by SIGTERM; step 5 is saved.")


def test_all_ranks_stop_when_one_is_asked_to(settings: dict[str, Any]) -> None:
    settings["data"]["init_args"]["batch_size"] = 8
    two = ["--trainer.devices=2", "--trainer.strategy=ddp"]  # whose second rank runs this command line too
    args = ["fit", "--config", write(Path("fit.yaml"), settings), *two]
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    command = [sys.executable, "-m", "featinv_pl", *args, *added("Interrupt", number=15, step=3)]
    result = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 143, result.stderr
    assert result.stderr.count("featinv-pl: stopped by SIGTERM; step 3 is saved.") == 1
    assert torch.load("run/inversion.ckpt", weights_only=True)["global_step"] == 3


def test_a_run_can_be_sent_to_processes_that_are_spawned(settings: dict[str, Any]) -> None:
    main(["fit", "--config", write(Path("fit.yaml"), settings), *added("Sent"), "--trainer.fast_dev_run=true"])
    assert Sent.bytes < 10_000_000  # of a hundred thousand weights, not of the command line


def test_a_second_ctrl_c_does_not_wait(settings: dict[str, Any]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["fit", "--config", write(Path("fit.yaml"), settings), *added("Impatient")])
    assert caught.value.code == 130
    assert torch.load("run/inversion.ckpt", weights_only=True)["global_step"] == 2


def test_who_keeps_the_best_alone_gets_the_last_when_stopped(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    settings["trainer"]["callbacks"][1]["init_args"] = {"filename": "best", "monitor": "val/loss"}
    args = ["fit", "--config", write(Path("fit.yaml"), settings)]
    _, line = stopped([*args, *added("Interrupt", number=15, step=3)], capsys)
    assert line.endswith("step 3 is saved. Go on: the same command with --ckpt_path run/last.ckpt")
    assert torch.load("run/last.ckpt", weights_only=True)["global_step"] == 3
    main(["validate", "--config", "fit.yaml", "--ckpt_path=best"])
    assert "--ckpt_path best: going on from 'run/best.ckpt'" in capsys.readouterr().err


def test_without_checkpoints_a_signal_saves_none(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    del settings["trainer"]["callbacks"][1]
    settings["trainer"]["enable_checkpointing"] = False
    args = ["fit", "--config", write(Path("fit.yaml"), settings)]
    code, line = stopped([*args, *added("Interrupt", number=15, step=3)], capsys)
    assert (code, line) == (143, "featinv-pl: stopped by SIGTERM; the same command goes on with what is not done yet.")
    assert not list(Path().rglob("*.ckpt"))


def test_extraction_goes_on_after_a_signal(
    classifier_folder: Path, prior_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["predict", "--config", write(Path("p.yaml"), extraction(classifier_folder, prior_folder, ["train"]))]
    code, line = stopped([*args, *added("Interrupt", number=15, step=0)], capsys)
    assert code == 143
    assert line.endswith("stopped by SIGTERM; the same command goes on with what is not done yet.")
    assert not Path("shards/train/manifest.json").exists()
    main(args)
    assert Path("shards/train/manifest.json").exists()


def test_full_disk_ends_training_and_keeps_the_last_checkpoint(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["fit", "--config", write(Path("fit.yaml"), settings)]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        code, line = stopped([*args, *added("FullDisk")], capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1
    assert "inversion.ckpt' could not be saved: File too large. What was there before is as it was." in line
    assert torch.load("run/inversion.ckpt", weights_only=True)["global_step"] == 2
    assert not list(Path("run").glob("*.partial"))
    main([*args, "--ckpt_path=run"])
    assert len(weights()) > 0


@pytest.mark.parametrize(
    ("what", "message"),
    [("loss", "step 3: loss inf, norm of the gradients "), ("gradient", "norm of the gradients nan. Such a step")],
)
def test_a_step_that_would_spoil_the_weights_is_not_made(
    what: str, message: str, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["fit", "--config", write(Path("fit.yaml"), settings)]
    code, line = stopped([*args, *added("Spoil", what=what)], capsys)
    assert code == 1
    assert message in line
    assert re.search(r"The samples were: (\d+, ){7}\d+ and 8 more\.", line)
    checkpoint = torch.load("run/inversion.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())


def test_weights_that_are_spoilt_are_not_saved(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    args = ["fit", "--config", write(Path("fit.yaml"), settings)]
    _, line = stopped([*args, *added("Spoil", what="weight")], capsys)
    assert re.search(r"step 4: 1 weights are not finite, such as control\.\S+, so they are not saved", line)
    assert torch.load("run/inversion.ckpt", weights_only=True)["global_step"] == 2


def test_a_step_may_be_skipped(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """It changes neither weights nor moments, and is counted."""
    settings["trainer"]["callbacks"][1]["init_args"] |= {"filename": "{step}", "every_n_train_steps": 1}
    settings["trainer"]["callbacks"][1]["init_args"]["save_top_k"] = -1
    settings["trainer"] |= {"logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "logs"}}}
    settings["trainer"]["log_every_n_steps"] = 1
    guard = ["--trainer.callbacks+=FiniteGuard", "--trainer.callbacks.max_skipped=1"]
    args = ["fit", "--config", write(Path("fit.yaml"), settings)]
    main([*args, *added("Spoil", what="gradient"), *guard])
    before, after, end = (torch.load(f"run/step={step}.ckpt", weights_only=True) for step in (3, 4, 5))
    for name, weight in before["current_model_state"].items():
        assert torch.equal(after["current_model_state"][name], weight)
    moved = [
        not torch.equal(end["current_model_state"][name], one) for name, one in before["current_model_state"].items()
    ]
    assert any(moved)
    [metrics] = Path("logs").rglob("metrics.csv")
    counted = [row for row in csv.DictReader(metrics.open()) if row["train/skipped"]]
    assert (counted[0]["step"], counted[-1]["train/skipped"]) == ("3", "1.0")

    capsys.readouterr()  # the allowance is that of a whole training
    code, line = stopped([*args, *added("SpoilNext"), *guard, "--ckpt_path=run/step=4.ckpt"], capsys)
    assert code == 1
    assert "step 4: loss nan" in line


def test_no_negative_number_of_steps_is_skipped(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    args = ["fit", "--config", write(Path("fit.yaml"), settings), "--trainer.callbacks+=FiniteGuard"]
    refused([*args, "--trainer.callbacks.max_skipped=-1"], capsys, "max_skipped must be 0 or more, and is -1")


def test_there_must_be_something_to_test(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    args = ["test", "--config", write(Path("fit.yaml"), settings)]
    refused([*args, "--ckpt_path=last"], capsys, "--ckpt_path last: there is no checkpoint yet. Run fit first")
    Path("empty").mkdir()
    refused([*args, "--ckpt_path=empty"], capsys, "--ckpt_path empty: there is no checkpoint yet.")


@pytest.mark.parametrize(
    "options",
    [
        ["--trainer.callbacks+=evil.Evil"],
        ["--model.optimizer=evil.Evil"],
        ["--model.sampler.refine=evil.Evil", "--trainer.callbacks+=evil.Evil"],
        ["--model=evil.Evil"],
        ["--data=evil.Evil"],
        ["--trainer.logger=evil.Evil"],
        ["--trainer.plugins+=evil.Evil"],
    ],
)
def test_classes_that_nobody_trusts_are_not_imported(
    options: list[str],
    settings: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A class path in a configuration is an import and a call."""
    Path("evil.py").write_text("from pathlib import Path\nPath('ran').touch()\nclass Evil:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    args = ["fit", "--config", write(Path("fit.yaml"), settings)]
    refused([*args, *options], capsys, "not trusted: 'evil.Evil' would be imported and run", "FEATINV_IMPORTS=evil (")
    assert not Path("ran").exists()


def test_the_module_that_loads_code_is_not_trusted_with_torch(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["fit", "--config", write(Path("fit.yaml"), settings), "--model.optimizer=torch.hub.load"]
    refused(args, capsys, "not trusted: 'torch.hub.load'", "FEATINV_IMPORTS=torch.hub (")


CALL: dict[str, Any] = {"class_path": "lightning.pytorch.cli.instantiate_class"}
CALL["init_args"] = {"args": "touch ran", "init": {"class_path": "os.system"}}


def test_nothing_is_made_where_anything_may_stand(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = {"model": "test_resnet", "num_classes": 10, "image_size": 32, "model_args": {"name": CALL}}
    settings = {
        "trainer": {"accelerator": "cpu", "logger": False},
        "model": {"class_path": "Classifier", "init_args": arguments},
        "data": {"class_path": "DigitsData"},
    }
    with pytest.raises(ValueError, match="unexpected keyword argument 'name'"):
        main(["fit", "--config", write(Path("fit.yaml"), settings)])
    assert not Path("ran").exists()
    refused(["fit", f"--model={json.dumps(CALL)}"], capsys, "not trusted: 'lightning.pytorch.cli.instantiate_class'")


def test_a_checkpoint_does_not_decide_what_is_made(settings: dict[str, Any], tmp_path: Path) -> None:
    """Lightning would make objects of what it calls its hyper-parameters."""
    args = ["fit", "--config", write(Path("fit.yaml"), settings)]
    main(args)
    checkpoint = torch.load("run/inversion.ckpt", weights_only=True)
    torch.save({**checkpoint, "hyper_parameters": {"optimizer": {"class_path": "torch.hub.load"}}}, "run/evil.ckpt")
    main([*args, "--ckpt_path=run/evil.ckpt", f"--trainer.max_steps={STEPS + 1}"])
    assert torch.load("run/inversion.ckpt", weights_only=True)["global_step"] == STEPS + 1


def test_trust_is_given_to_modules(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATINV_IMPORTS", "good, os;evil")
    refused(["fit", "--help"], capsys, "FEATINV_IMPORTS: 'os;evil' is no package or module. Separate several by commas")
