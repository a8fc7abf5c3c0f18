"""The processes of one run, as `ddp` starts them: they end together.

Lightning's first process watches those that it has started, and ends if one of them fails. Here they watch it too.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, distributed
from torchmetrics.utilities.distributed import gather_all_tensors

from featinv_pl.errors import UserError

FIRST = "FEATINV_FIRST_RANK"  # in the environment of the ranks that a process starts: its number
GRACE = 15.0  # seconds in which the other ranks end by themselves when all is done
Result = TypeVar("Result")
log = logging.getLogger(__name__)


@rank_zero_only
def say(text: str) -> None:
    """Log a line, once however many ranks there are."""
    log.info(text)


@contextmanager
def ranks_together() -> Iterator[None]:
    """Replace the traceback of a broken connection between ranks by one line: another rank is gone."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
            raise
        raise UserError(
            "another process of this run has died, so this one ends too. See what that has said, if anything; its "
            "machine may have been out of memory. What was saved is complete: the same command resumes, `fit` with "
            "`ckpt_path` last."
        ) from error


def join_ranks() -> None:
    """Follow the process that has started this one as a further rank; lead those that this one will start."""
    if (first := first_rank()) is None:
        os.environ[FIRST] = str(os.getpid())
    else:
        threading.Thread(target=_follow, args=(first,), daemon=True).start()


def first_rank() -> int | None:
    """The number of the process that has started this one as a further rank, if one has."""
    parent = os.getppid()
    return parent if "LOCAL_RANK" in os.environ and os.environ.get(FIRST) == str(parent) else None


def forget_children() -> None:
    """Take an end of the ranks that this process has started for no failure any more."""
    for thread in threading.enumerate():
        if isinstance(thread, _ChildProcessObserver):
            thread._child_processes = []


def hands_back_little(trainer: Trainer) -> bool:
    """Whether the trainer runs in processes that Lightning has forked or spawned, and joins before it reads from them.

    They never end if they hand back more than a pipe holds, which some 200 scores are.
    """
    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def of_all_ranks(item: Any) -> list[Any]:
    """The values of all ranks, on all ranks."""
    if not distributed.is_initialized():
        return [item]
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, item)
    return gathered


def mean_of_ranks(values: Tensor) -> Tensor:
    """The mean over ranks, on all of them, of values that there are on all of them. It does not wait for the device."""
    if distributed.is_initialized():
        values = values.clone()
        distributed.all_reduce(values)
        values /= distributed.get_world_size()
    return values


def rows_of_all_ranks(rows: Tensor) -> Tensor:
    """The rows (n, ...) of all ranks, each of which may have another n: those of the first rank come first."""
    return torch.cat(gather_all_tensors(rows)) if distributed.is_initialized() else rows


def agree(work: Callable[[], Result]) -> Result:
    """Do something on all ranks, which later wait for each other: a UserError of one is raised on all."""
    result, error = None, None
    try:
        result = work()
    except UserError as failure:
        error = str(failure)
    for message in filter(None, of_all_ranks(error)):
        raise UserError(message)
    return cast(Result, result)


def _follow(first: int) -> None:
    while os.getppid() == first:
        time.sleep(1)
    time.sleep(GRACE)
    log.error("error: the first process of this run has died, so this one ends too.")
    os._exit(1)
