"""Run every shipped YAML and every make target on tiny parts, and print what came of it as a table: make smoke."""

import argparse
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import chdir, redirect_stderr, redirect_stdout
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import torch

from smoke.files import jobs
from smoke.parts import make_parts
from smoke.targets import TARGETS, make

LOG = Path(tempfile.gettempdir()) / "smoke-log.txt"


def attempt(name: str, act: Callable[[], str]) -> tuple[bool, str]:
    """Run something, with all that it prints in a file: whether it went well, and a row of the table."""
    start, good = time.monotonic(), True
    with LOG.open("a") as log, redirect_stdout(log), redirect_stderr(log):
        print(f"\n--- {name}")
        try:
            done, result = act(), "good"
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            good, done, result = False, "", f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return good, f"| `{name}` | {done} | {time.monotonic() - start:.0f} | {result} |"


def shortly(target: str) -> str:
    make(target)
    return f"make {target} SHORT=1"


def main() -> None:
    parser = argparse.ArgumentParser("smoke", description=__doc__)
    parser.add_argument("--only", default="*", help="files and targets that fit this pattern; others may need more")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ |= dict.fromkeys(("HF_HUB_OFFLINE", "WANDB_SILENT"), "true")
    os.environ |= {"WANDB_MODE": "offline", "FEATINV_IMPORTS": "smoke,bench"}
    acts = {f"experiments/{name}": act for name, act in jobs().items()}
    # The demo first, as `demo-once` of others, which then reuse it.
    acts |= {f"make {target}": partial(shortly, target) for target in ("demo", *TARGETS)}
    failed = False
    print("| file | what was run | seconds | result |\n|---|---|--:|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        make_parts(Path(folder))
        for name, act in acts.items():
            if fnmatch(name.partition("/")[2] or name.removeprefix("make "), options.only):
                good, row = attempt(name, act)
                failed |= not good
                print(row, flush=True)
    print(f"\nAll that was printed is in {LOG}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
