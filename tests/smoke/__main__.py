"""Run every shipped YAML and every make target on tiny parts, and write what came of it as a table.

make smoke
"""

import argparse
import logging
import os
import platform
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import date
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import torch

from smoke.files import SHIPPED, TAKEN_ALONG, Job, bases, jobs
from smoke.parts import make_parts
from smoke.targets import TARGETS, make

HEAD = "| file | what was run | seconds | result |\n|---|---|--:|---|"
LOG = Path("log.txt")
INTRO = """# What ships runs

`make smoke` runs every YAML under `experiments/` by the public command, and every make target in its short form
(`SHORT=1`), in a temporary folder. Only what is too large for that is replaced: backbones by tiny ones of the same
family and input size, the prior by a tiny one, images by generated ones in the same layout. Batches are smaller,
training ends after two steps, data is read by the process itself, and the published weights of Inception and AlexNet
are not fetched. Sweeps are started by W&B's own agent, which a server of the tests tells what to try. `make test`
repeats one file of each kind, and fails if a YAML or a target is missing here.

"""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    done: str
    seconds: float | None
    result: str

    def __str__(self) -> str:
        seconds = "" if self.seconds is None else f"{self.seconds:.0f}"
        return f"| `{self.name}` | {self.done} | {seconds} | {self.result} |"


def prepare(root: Path) -> None:
    """A folder in which every file finds what it names."""
    (root / "experiments").symlink_to(SHIPPED)
    make_parts(root)


def attempt(name: str, act: Callable[[], str]) -> Row:
    """Run something, with all that it prints in a file; an error is the row's result."""
    start = time.monotonic()
    done, result = "", "good"
    with LOG.open("a") as log, redirect_stdout(log), redirect_stderr(log):
        print(f"\n--- {name}")
        try:
            done = act()
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            result = f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return Row(name, done, time.monotonic() - start, result)


def smoke(chosen: dict[str, Job]) -> Iterator[Row]:
    """Run files, in the current folder."""
    for name, job in chosen.items():
        yield attempt(f"experiments/{name}", job.act)
    counts = {name: number for name, number in bases().items() if name not in jobs()}
    for name, number in sorted(counts.items()):
        yield Row(f"experiments/{name}", f"beneath {number} of these files", None, "")
    for name, how in TAKEN_ALONG.items():
        yield Row(f"experiments/{name}", how, None, "")


def main() -> None:
    parser = argparse.ArgumentParser("smoke", description=__doc__)
    parser.add_argument(
        "--only", default="*", help="files and targets whose name fits this pattern; others may need more"
    )
    parser.add_argument("--out", type=Path, help="a file for the table, such as docs/smoke.md")
    parser.add_argument("--keep", type=Path, help="the folder to work in, which is kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # whose messages are no part of the table
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "FEATINV_IMPORTS": "smoke,bench",
    }
    begun = time.monotonic()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = options.keep or Path(folder)
        if not (root / "parts").exists():
            root.mkdir(exist_ok=True)
            prepare(root)
        print(HEAD, flush=True)
        with chdir(root):
            for row in _rows(options.only):
                print(row, flush=True)
                rows.append(row)
            failed = [row for row in rows if row.result.startswith("FAILED")]
            if failed:
                shutil.copy(LOG, Path(tempfile.gettempdir()) / "smoke-log.txt")
                print(f"\n{len(failed)} failed; all that was printed is in {tempfile.gettempdir()}/smoke-log.txt")
    minutes = f"{(time.monotonic() - begun) / 60:.0f} minutes, torch {torch.__version__}, {platform.machine()}"
    print(f"\n{minutes}")
    if options.out:
        options.out.write_text(INTRO + "\n".join([HEAD, *map(str, rows), "", f"{minutes}, {date.today()}.", ""]))
    sys.exit(bool(failed))


def _rows(pattern: str) -> Iterator[Row]:
    yield from smoke({name: job for name, job in jobs().items() if fnmatch(name, pattern)})
    # The demo first, as `demo-once` of others, which then reuse it.
    for target in ("demo", *TARGETS):
        if fnmatch(target, pattern):
            yield attempt(f"make {target}", partial(_make, target))


def _make(target: str) -> str:
    make(target)
    return f"make {target} SHORT=1"


if __name__ == "__main__":
    main()
