"""Make targets in their short form, in a folder of their own that looks like the project's."""

import os
import re
import shlex
import subprocess
from pathlib import Path

from featinv_pl.__main__ import main

PROJECT = Path(__file__).parents[2]
TARGETS = ("bench", "gpu", "bench-data", "torture", "parity", "full-size", "viz-digits", "notebooks", "dist", "matrix")
"""Those that run no file of `experiments` by itself; the demo and the studies do."""
INHERITED = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")  # by which an outer make would pass its own FLAGS on
LINKED = ("Makefile", "pyproject.toml", "constraints.txt", ".venv", "src", "tests", "experiments", "docs")


def make(target: str, *, short: bool = True, **variables: str) -> str:
    """Run a target in the current folder, and return what it prints."""
    for name in LINKED:
        if not Path(name).exists():
            Path(name).symlink_to(PROJECT / name)
    command = ["make", "--old-file=.venv/.installed", target, *(["SHORT=1"] if short else [])]
    command += [f"{name}={value}" for name, value in variables.items()]
    outside = {name: value for name, value in os.environ.items() if name not in INHERITED}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=outside)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-300:]
    return done.stdout


def started(output: str) -> list[list[str]]:
    """The public commands that a workflow has started or, in a dry run, would start: the words after `featinv-pl`."""
    return [shlex.split(line) for line in re.findall(r"^Job \d+: featinv-pl (.*)$", output, re.MULTILINE)]


def run_here(planned: str) -> None:
    """Do the steps of a dry run with `--printshellcmds` in this process, which has loaded the libraries."""
    for line in re.findall(r"step\.sh (.*)$", planned, re.MULTILINE):
        folder, name, digest, *rest = shlex.split(line)
        main(rest[rest.index("featinv-pl") + 1 :])
        done = Path(folder, "steps", f"{name}.{digest}")
        done.parent.mkdir(parents=True, exist_ok=True)
        done.write_text("1\n")
