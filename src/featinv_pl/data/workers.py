"""Loader workers: deaf to signals of the group, gone when the run is, and forked from a server without threads.

A fork of a process with threads may inherit a lock that nobody releases; a clean server imports torch only once.
"""

import multiprocessing
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from featinv_pl.data.order import Batches
from featinv_pl.errors import UserError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
POLL_S = 1.0  # how often a worker checks that its run is alive
SHARED = "/dev/shm"  # where workers put their batches
DIED = re.compile(r"DataLoader worker \(pid|unable to \w+ (shared memory|file)")

Item = TypeVar("Item")


def start_server(*modules: str) -> None:
    """Start this process's server, which imports the datasets' modules while the run is still preparing."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise UserError(
            "`num_workers`: each worker imports the script that starts it. Put the script's commands below "
            "`if __name__ == '__main__':`, or set `num_workers` to 0."
        )
    forkserver.set_forkserver_preload([*modules])
    # Ctrl-C, and SIGTERM from a scheduler, reach the whole group. The run answers: it saves at the end of a step, for
    # which it still needs its workers. Blocked signals stay blocked in processes that are started now.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # the tracker has unblocked some
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def loader(dataset: Dataset[Item], batches: Batches, num_workers: int, again: bool = False) -> DataLoader[Item]:
    """A loader whose picklable dataset is indexed by the list of samples in a batch.

    `num_workers` processes read, or this one if there are none; they stay if the loader is iterated `again`.
    """
    if num_workers:
        start_server(type(dataset).__module__)
    return DataLoader(
        dataset,
        batch_size=None,  # the sampler's items are batches
        sampler=batches,
        num_workers=num_workers,
        persistent_workers=again and num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context="forkserver" if num_workers else None,
        worker_init_fn=_end_with_run,
    )


@contextmanager
def workers_explained() -> Iterator[None]:
    """Replace torch's traceback by one line where a worker has died, or its batch did not fit into shared memory."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]  # the first are the worker's traceback
        if not DIED.search(reason):
            raise
        raise UserError(
            f"`num_workers`: a worker has died ({reason}). If it has not said why, memory was short: {SHARED} has "
            f"{shutil.disk_usage(SHARED).free >> 20} MB left. Lower it, or enlarge {SHARED} (docker run --shm-size=8g)."
        ) from error


def _end_with_run(worker: int) -> None:
    """End when the run says so or is gone: torch watches the parent process, which here is the server."""
    run: Any = multiprocessing.parent_process()

    def follow() -> None:
        while run.is_alive():
            asked = signal.sigtimedwait([signal.SIGTERM], POLL_S)
            if asked is not None and asked.si_pid == run.pid:
                break
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


# A fork of this process, such as a rank of `ddp_fork`, cannot use a server that is not its child.
os.register_at_fork(after_in_child=lambda: forkserver._forkserver.__init__())  # type: ignore[misc]
