"""Training that loses no work: every end is saved, and the same command resumes as if nothing had been."""

import contextlib
import multiprocessing
import os
import pty
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from featinv_pl.__main__ import main
from featinv_pl.runtime import stopping
from featinv_pl.runtime.ranks import FIRST
from interrupts import Capture, Sent, Validated, added, assert_same, checkpoint, eventually, stopped, weights
from test_cli import refused
from tiny import write
from torture.kills import group
from torture.processes import SEEN, TWO, lines, start

Uninterrupted = tuple[dict[str, Tensor], dict[int, list[str]]]
TERM, INT, HUP, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1


def interrupt(*numbers: int, step: int, **more: Any) -> list[str]:
    return added("Interrupt", numbers=[int(number) for number in numbers], step=step, **more)


@pytest.mark.parametrize(("number", "step", "validating"), [(TERM, 3, False), (INT, 2, True)])
def test_resumes_after_a_signal(
    number: signal.Signals, step: int, validating: bool, fit: list[str], uninterrupted: Uninterrupted, capsys: Capture
) -> None:
    args = [*fit, "--ckpt_path=last", *added("Validated")]
    code, line = stopped([*args, *interrupt(number, step=step, validating=validating)], capsys)
    assert code == 128 + number
    assert line == (
        f"featinv-pl: stopped by {number.name}; step {step} is saved. "
        "Resume: the same command with --ckpt_path run/inversion.ckpt"
    )
    Validated.keys.clear()
    main(args)
    assert "--ckpt_path last: 'run/inversion.ckpt'" in capsys.readouterr().err
    complete, validated = uninterrupted
    assert_same(weights(), complete)
    # A validation that was to come, or under way, is held from its first sample on.
    assert Validated.keys == {key: value for key, value in validated.items() if key >= step}
    assert sorted(path.name for path in Path("run").iterdir()) == ["fit.yaml", "inversion.ckpt"]


def test_workers_leave_a_signal_to_the_group_to_the_run(fit: list[str]) -> None:
    child = start([*fit, "--data.num_workers=2", *interrupt(INT, step=3, group=True)], Path())
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 130, Path("output.txt").read_text()
    assert "stopped by SIGINT; step 3 is saved." in Path("output.txt").read_text()
    assert checkpoint()["global_step"] == 3
    assert eventually(lambda: not group(child))


def test_workers_end_with_a_run_that_is_killed(fit: list[str]) -> None:
    child = start([*fit, "--data.num_workers=2", "--trainer.max_steps=100000"], Path())
    assert eventually(Path("run/inversion.ckpt").is_file)
    assert eventually(lambda: len(group(child)) >= 5)  # the run, its server, what tracks resources, and two workers
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert eventually(lambda: not group(child))


def test_a_worker_that_dies_is_one_line(fit: list[str], capsys: Capture) -> None:
    code, line = stopped([*fit, "--data.num_workers=1", *added("LoseWorker")], capsys)
    assert code == 1
    assert line.startswith("featinv-pl: error: --data.num_workers: a worker has died (DataLoader worker (pid")
    assert "or enlarge /dev/shm" in line


def test_a_script_that_a_worker_would_run_again(
    fit: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)  # as a new worker says
    refused([*fit, "--data.num_workers=1"], capsys, "below `if __name__ == '__main__':`")


def test_a_lost_terminal_saves_and_ends(fit: list[str]) -> None:
    args = [*fit, "--trainer.max_steps=100000", "--trainer.enable_progress_bar=true", "--data.num_workers=2"]
    child, terminal = pty.fork()
    if not child:
        code: Any = 1
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
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
    assert os.waitstatus_to_exitcode(status) == 128 + HUP
    assert checkpoint()["global_step"] >= 2


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for SLURM's command, which notes how it is called, in a job of SLURM."""
    path = tmp_path / "scontrol"
    path.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path / "called"}\n')
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    job = {"NTASKS": 1, "NTASKS_PER_NODE": 1, "JOB_ID": 4242, "PROCID": 0, "LOCALID": 0, "NODEID": 0}
    for name, value in {**job, "JOB_NAME": "train", "NODELIST": "localhost"}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    return path


def test_slurm_starts_a_job_again(
    scontrol: Path, fit: list[str], uninterrupted: Uninterrupted, capsys: Capture
) -> None:
    code, line = stopped([*fit, *interrupt(USR1, step=3)], capsys)
    assert code == 128 + USR1
    assert line == (
        "featinv-pl: stopped by SIGUSR1; step 3 is saved. Resume: the same command with --ckpt_path "
        "run/hpc_ckpt_1.ckpt (SLURM does that: job 4242 is requeued)"
    )
    assert scontrol.with_name("called").read_text() == "requeue 4242\n"
    main(fit)  # Lightning finds what was saved
    assert_same(weights(), uninterrupted[0])


def test_slurm_may_refuse_and_may_send_sigterm_too(scontrol: Path, fit: list[str], capsys: Capture) -> None:
    scontrol.write_text("#!/bin/sh\nexit 1\n")
    code, line = stopped([*fit, *interrupt(USR1, TERM, step=1)], capsys)
    assert code == 128 + USR1
    assert line.endswith("--ckpt_path run/hpc_ckpt_1.ckpt (scontrol requeue has failed)")
    scontrol.unlink()
    fit.append("--trainer.plugins+=lightning.pytorch.plugins.environments.SLURMEnvironment")
    fit.append("--trainer.plugins.requeue_signal=SIGUSR2")
    _, line = stopped([*fit, "--ckpt_path=hpc", *interrupt(signal.SIGUSR2, step=2)], capsys)
    assert line.endswith("--ckpt_path run/hpc_ckpt_2.ckpt (scontrol requeue has failed)")


def test_all_ranks_stop_when_one_is_asked_to(fit: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FIRST, raising=False)  # of commands that this process has run; it leads no ranks
    _, status = os.waitpid(start([*fit, *TWO, "--data.batch_size=8", *interrupt(TERM, step=3)], Path()), 0)
    said = Path("output.txt").read_text()
    assert os.waitstatus_to_exitcode(status) == 143, said
    assert said.count("featinv-pl: stopped by SIGTERM; step 3 is saved.") == 1
    assert checkpoint()["global_step"] == 3


def test_ranks_on_gpus_ask_each_other_about_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [stopping.pause(gpu, seconds) for seconds in (0.01, 0.16, 3)] == [100, 6, 1]
    assert stopping.pause(cpu, 0.01) == 1
    monkeypatch.setattr(stopping, "pause", lambda *_: 3)
    stop = stopping.Stop()
    asked = []
    for batch in range(9):
        if batch == 4:
            stop.signal = TERM
        asked.append(stop._asked(cpu))
    assert asked == [0, 0, 0, 0, 0, 0, TERM, TERM, TERM]  # after it, at every batch


def test_a_run_can_be_sent_to_processes_that_are_spawned(fit: list[str]) -> None:
    main([*fit, *added("Sent"), "--trainer.fast_dev_run=true"])
    assert Sent.bytes < 10_000_000  # of a hundred thousand weights, not of the command line


def test_a_second_ctrl_c_does_not_wait(fit: list[str]) -> None:
    with pytest.raises(SystemExit, match="130"):
        main([*fit, *interrupt(INT, INT, step=3)])
    assert checkpoint()["global_step"] == 2


def test_who_keeps_the_best_alone_gets_the_last_when_stopped(settings: dict[str, Any], capsys: Capture) -> None:
    settings["trainer"]["callbacks"][1]["init_args"] = {"filename": "best", "monitor": "val/loss"}
    config = write(Path("fit.yaml"), settings)
    _, line = stopped(["fit", "--config", config, *interrupt(TERM, step=3)], capsys)
    assert line.endswith("step 3 is saved. Resume: the same command with --ckpt_path run/last.ckpt")
    assert checkpoint("run/last.ckpt")["global_step"] == 3
    main(["validate", "--config", config, "--ckpt_path=best"])
    assert "--ckpt_path best: 'run/best.ckpt'" in capsys.readouterr().err


def test_without_checkpoints_a_signal_saves_none(settings: dict[str, Any], capsys: Capture) -> None:
    del settings["trainer"]["callbacks"][1]
    settings["trainer"]["enable_checkpointing"] = False
    args = ["fit", "--config", write(Path("fit.yaml"), settings)]
    code, line = stopped([*args, *interrupt(TERM, step=1)], capsys)
    assert (code, line) == (143, "featinv-pl: stopped by SIGTERM; the same command resumes what is not done yet.")
    assert not list(Path().rglob("*.ckpt"))


def test_there_must_be_something_to_test(settings: dict[str, Any], capsys: Capture) -> None:
    args = ["test", "--config", write(Path("fit.yaml"), settings)]
    Path("empty").mkdir()
    for given in ("last", "empty"):
        refused([*args, f"--ckpt_path={given}"], capsys, f"--ckpt_path {given}: there is no checkpoint yet. Run fit")


def test_a_checkpoint_does_not_decide_what_is_made(fit: list[str]) -> None:
    """Lightning would make objects of what it calls its hyper-parameters."""
    main([*fit, "--trainer.max_steps=1"])
    evil = {"hyper_parameters": {"optimizer": {"class_path": "torch.hub.load"}}}
    torch.save({**checkpoint(), **evil}, "run/evil.ckpt")
    main([*fit, "--ckpt_path=run/evil.ckpt", "--trainer.max_steps=2"])
    assert checkpoint()["global_step"] == 2


@pytest.fixture
def config(settings: dict[str, Any]) -> str:
    settings["trainer"]["callbacks"][1]["init_args"] |= {
        "filename": "{step}",
        "every_n_train_steps": 1,
        "save_top_k": -1,
    }
    settings["trainer"]["callbacks"].append({"class_path": "torture.processes.Recorder"})
    settings["trainer"] |= {"max_steps": 7, "limit_val_batches": 0}
    return write(Path("fit.yaml"), settings)


def seen() -> list[Any]:
    path = Path(SEEN.format(0))
    found = [(step, keys) for _, step, keys in lines(path)]
    path.unlink()
    return found


def test_training_resumes_from_any_step(config: str, capsys: Capture) -> None:
    main(["fit", "--config", config])
    complete, final = seen(), weights("run/step=7.ckpt", 7)
    assert [step for step, _ in complete] == list(range(7))
    for epoch in (complete[:3], complete[3:6]):
        keys = [key for _, keys in epoch for key in keys]
        assert len(keys) == len(set(keys)) == 48
    Path("run").rename("before")
    for step in (3, 5):  # at the end of an epoch, and within one
        more = [f"--data.num_workers={step // 5}", f"--trainer.default_root_dir=from-{step}"]  # may both be others
        main(["fit", "--config", config, "--ckpt_path", f"before/step={step}.ckpt", *more])
        assert seen() == complete[step:]
        assert_same(weights(f"from-{step}/step=7.ckpt", 7), final)
    # What is left of an epoch depends on how it was shared out.
    other = ["fit", "--config", config, "--data.batch_size=8", "--ckpt_path"]
    refused([*other, "before/step=5.ckpt"], capsys, "batch_size: 16 in the checkpoint, 8 here")
    main([*other, "before/step=6.ckpt"])  # a whole number of epochs
    assert [step for step, _ in seen()] == [6]
