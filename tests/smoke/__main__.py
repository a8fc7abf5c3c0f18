"""Run every shipped YAML and every make target on tiny parts, and write what came of it as a table: make smoke."""

import argparse
import logging
import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir, redirect_stderr, redirect_stdout
from datetime import date
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from smoke.files import SHIPPED, TAKEN_ALONG, bases, jobs
from smoke.parts import NETWORKS, make_parts
from smoke.targets import TARGETS, make

HEAD = "| file | what was run | seconds | result |\n|---|---|--:|---|"
LOG = Path(tempfile.gettempdir()) / "smoke-log.txt"


class Row(NamedTuple):
    """One line of the table."""

    name: str
    done: str
    seconds: str
    result: str

    def __str__(self) -> str:
        return f"| `{self.name}` | {self.done} | {self.seconds} | {self.result} |"


def prepare(root: Path, networks: Sequence[str] = tuple(NETWORKS)) -> None:
    """A folder in which every file finds what it names; see `make_parts`."""
    (root / "experiments").symlink_to(SHIPPED)
    make_parts(root, networks)


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
    return Row(name, done, f"{time.monotonic() - start:.0f}", result)


def rows(pattern: str) -> Iterator[Row]:
    """Run files and targets whose names fit a pattern, in the current folder."""
    known = jobs()
    for name, act in known.items():
        if fnmatch(name, pattern):
            yield attempt(f"experiments/{name}", act)
    for name, number in sorted(bases().items()):
        if name not in known:
            yield Row(f"experiments/{name}", f"beneath {number} of these files", "", "")
    for name, how in TAKEN_ALONG.items():
        yield Row(f"experiments/{name}", how, "", "")
    for target in ("demo", *TARGETS):  # the demo first, as `demo-once` of others, which then reuse it
        if fnmatch(target, pattern):
            yield attempt(f"make {target}", partial(make, target))._replace(done=f"make {target} SHORT=1")


def main() -> None:
    parser = argparse.ArgumentParser("smoke", description=__doc__)
    parser.add_argument("--only", default="*", help="files and targets that fit this pattern; others may need more")
    parser.add_argument("--out", type=Path, help="the page whose table is replaced, such as docs/smoke.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # whose messages are no part of the table
    os.environ |= dict.fromkeys(("HF_HUB_OFFLINE", "WANDB_SILENT"), "true")
    os.environ |= {"WANDB_MODE": "offline", "FEATINV_IMPORTS": "smoke,bench"}
    begun, table = time.monotonic(), [HEAD]
    LOG.unlink(missing_ok=True)
    print(HEAD, flush=True)
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        prepare(Path(folder))
        for row in rows(options.only):
            print(row, flush=True)
            table.append(str(row))
    minutes = f"{(time.monotonic() - begun) / 60:.0f} minutes, torch {torch.__version__}, {platform.machine()}"
    print(f"\n{minutes}; all that was printed is in {LOG}")
    if options.out:
        intro = options.out.read_text().partition(HEAD)[0]
        options.out.write_text(intro + "\n".join([*table, "", f"{minutes}, {date.today()}.", ""]))
    sys.exit(any("| FAILED" in line for line in table))


if __name__ == "__main__":
    main()
