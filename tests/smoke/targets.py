"""Make targets in their short form, in a folder of their own that looks like the project's."""

import subprocess
from pathlib import Path

PROJECT = Path(__file__).parents[2]
TARGETS = ("bench", "bench-data", "torture", "parity", "full-size", "wandb-picture", "viz-digits")
"""Those that run no file of `experiments` by itself; the demo and the studies do."""
LINKED = ("Makefile", "pyproject.toml", "constraints.txt", ".venv", "src", "tests")


def make(target: str, **variables: str) -> str:
    """Run `make TARGET SHORT=1`."""
    for name in LINKED:
        if not Path(name).exists():
            Path(name).symlink_to(PROJECT / name)
    docs = Path("docs")
    docs.mkdir(exist_ok=True)
    for one in (PROJECT / docs).iterdir():
        if one.name != "wandb.png" and not (docs / one.name).exists():  # which a target replaces
            (docs / one.name).symlink_to(one)
    command = ["make", "--old-file=.venv/.installed", target, "SHORT=1"]
    command += [f"{name}={value}" for name, value in variables.items()]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-300:]
    return f"make {target} SHORT=1"
