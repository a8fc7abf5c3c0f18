"""The public command in processes that can be killed at chosen moments, and what its runs note for comparison.

Most are forks of this process, which has imported everything already; two ranks are then started as torchrun would.
"""

import contextlib
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger

from featinv_pl.__main__ import main

ENVIRONMENT = {"FEATINV_IMPORTS": "torture.processes,interrupts", "OMP_NUM_THREADS": "1"}
PATIENCE_S = 180.0
POLL_S = 0.002
TWO = ("--trainer.devices=2", "--trainer.strategy=ddp")
SEEN, ROWS = "seen-{}.jsonl", "rows.jsonl"
TIMED = ("train/samples_per_second", "epoch")  # the one is measured, the other Lightning's at the end of a validation

Moment = Callable[[float], bool]
"""Whether to kill now, from the seconds since the start."""


class Recorder(Callback):
    """Appends a line for each batch that is trained on or evaluated: what for, the step, and the samples."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        append(SEEN.format(trainer.global_rank), [trainer.state.stage, trainer.global_step, batch["key"]])

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self.on_train_batch_start(trainer, pl_module, batch, 0)

    on_test_batch_end = on_validation_batch_end  # type: ignore[assignment]


class Rows(Logger):
    """Appends a line for each row of metrics."""

    name = version = "rows"

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        append(ROWS, [step, {name: value for name, value in metrics.items() if name not in TIMED}])


def append(path: str, line: Any) -> None:
    with Path(path).open("a") as file:
        file.write(json.dumps(line) + "\n")


def lines(path: Path) -> list[Any]:
    """All complete lines: a kill may come within one."""
    found = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in found if line.endswith("]")]


def start(args: Sequence[str], folder: Path, largest: int | None = None) -> int:
    """Start the public command in a process group of its own, which writes files of so many bytes at most."""
    if child := os.fork():
        return child
    code: object = 1
    try:
        os.setsid()
        os.chdir(folder)
        output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))  # not pytest's
        warnings.resetwarnings()  # nor pytest's
        os.environ |= ENVIRONMENT | {"TMPDIR": str(folder)}
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest or hard, hard))
        other = None
        if set(TWO) <= set(args):
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_network_port())}
            other = os.fork()
            os.environ["LOCAL_RANK"] = "0" if other else "1"
        main(list(args))
        code = os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) if other else 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def start_as_users_do(args: Sequence[str], folder: Path) -> int:
    """Start the public command in a process group of its own, in which Lightning starts further ranks."""
    environment = {**os.environ, **ENVIRONMENT, "TMPDIR": str(folder), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "featinv_pl", *args]
    with (folder / "output.txt").open("ab") as file:
        return subprocess.Popen(
            command, cwd=folder, env=environment, stdout=file, stderr=file, start_new_session=True
        ).pid


def ended(child: int) -> int | None:
    """The exit status of a process, if it has ended."""
    pid, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if pid else None


def kill(child: int) -> None:
    """Kill a process and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(child, 0)


def run(
    args: Sequence[str], folder: Path, moment: Moment | None = None, expected: int = 0, largest: int | None = None
) -> bool:
    """Run the public command, kill it at a moment unless it ends before, and say whether it has come to its end."""
    begun, child = time.monotonic(), start(args, folder, largest)
    while (status := ended(child)) is None:
        seconds = time.monotonic() - begun
        if moment and moment(seconds):
            kill(child)
            return False
        if seconds > PATIENCE_S:
            kill(child)
            raise TimeoutError(f"{args} has not ended in {PATIENCE_S:.0f} seconds")
        time.sleep(POLL_S if moment else 10 * POLL_S)
    if status != expected:
        raise RuntimeError(f"{args} ended with {status}:\n{(folder / 'output.txt').read_text()[-3000:]}")
    return True


def moments(marks: Callable[[], int], total: int, folder: Path, rng: random.Random) -> Iterator[Moment]:
    """Moments spread over the work left, of which `marks` counts `total` in the end; half while a file is written."""
    while True:
        for writing in (folder, None):
            before = marks()
            delay = 0.5 if writing else rng.uniform(0, 0.1)
            yield moment(marks, before + rng.randrange(max(total - before, 1)), writing, delay)


def moment(marks: Callable[[], int], count: int, writing: Path | None, delay: float) -> Moment:
    """Once so much has been done: some time later, or before that while a file in a folder has its temporary name."""
    since, next_look = math.inf, 0.0

    def now(seconds: float) -> bool:
        nonlocal since, next_look
        if since == math.inf and seconds > next_look:
            since, next_look = seconds if marks() > count else math.inf, seconds + 10 * POLL_S
        begun = writing is not None and seconds >= since and any(writing.rglob("*.partial"))
        return begun or seconds >= since + delay

    return now
