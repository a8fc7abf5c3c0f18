"""The public command in processes of its own, which can be killed at chosen moments.

Most are forks of this process, which has imported everything already; two ranks are then started as torchrun would.
"""

import contextlib
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

import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port

from featinv_pl.__main__ import main

ENVIRONMENT = {"FEATINV_IMPORTS": "torture.observers,interrupts", "OMP_NUM_THREADS": "1"}
PATIENCE_S = 180.0
POLL_S = 0.002
TWO = ("--trainer.devices=2", "--trainer.strategy=ddp")

Moment = Callable[[float], bool]
"""Whether to kill now, from the seconds since the start."""


def start(args: Sequence[str], folder: Path, largest: int | None = None) -> int:
    """Start the public command in a process group of its own, which writes files of so many bytes at most."""
    child = os.fork()
    if child:
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
        torch.set_num_threads(1)
        if largest is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        if set(TWO) <= set(args):
            code = in_two(args)
        else:
            main(list(args))
            code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def in_two(args: Sequence[str]) -> int:
    """Be the first of two ranks, and return the exit status of the other."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_network_port()), "LOCAL_RANK": "0"}
    other = os.fork()
    if not other:
        os.environ["LOCAL_RANK"] = "1"
    main(list(args))
    return os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) if other else 0


def start_as_users_do(args: Sequence[str], folder: Path) -> int:
    """Start the public command in a process group of its own, in which Lightning starts further ranks."""
    with (folder / "output.txt").open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "featinv_pl", *args],
            cwd=folder,
            env={**os.environ, **ENVIRONMENT, "TMPDIR": str(folder), "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=file,
            stderr=file,
            start_new_session=True,
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
    args: Sequence[str], folder: Path, moment: Moment = lambda _: False, expected: int = 0, largest: int | None = None
) -> float | None:
    """Run the public command and kill it at a moment, unless it ends before.

    Returns:
        The seconds that it took, or None if it was killed.
    """
    begun = time.monotonic()
    child = start(args, folder, largest)
    while (status := ended(child)) is None:
        seconds = time.monotonic() - begun
        if moment(seconds):
            kill(child)
            return None
        if seconds > PATIENCE_S:
            kill(child)
            raise TimeoutError(f"{args} has not ended in {PATIENCE_S:.0f} seconds")
        time.sleep(POLL_S)
    if status != expected:
        raise RuntimeError(f"{args} ended with {status}:\n{(folder / 'output.txt').read_text()[-3000:]}")
    return time.monotonic() - begun


def moments(marks: Callable[[], int], total: int, folder: Path, rng: random.Random) -> Iterator[Moment]:
    """Moments spread over the work left, of which `marks` counts `total` in the end; half while a file is written."""
    while True:
        for writing in (folder, None):
            before = marks()
            yield moment(marks, before + rng.randrange(max(total - before, 1)), writing, rng.uniform(0, 0.1))


def moment(marks: Callable[[], int], count: int, writing: Path | None, delay: float) -> Moment:
    """Once so much has been done: while a file in a folder has its temporary name, or some time later."""
    since: list[float] = []

    def now(seconds: float) -> bool:
        if not since and marks() > count:
            since.append(seconds)
        if not since or writing is None:
            return bool(since) and seconds >= since[0] + delay
        return any(writing.rglob("*.partial")) or seconds >= since[0] + 0.5

    return now
