"""The package as people install it: built, in an empty environment, and with every Python and the oldest libraries.

make dist
make matrix
"""

import argparse
import os
import shlex
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
SOURCE = PROJECT / "src"
EXTRAS = ("app", "datasets", "s3")
PYTHONS = ("3.11", "3.12", "3.13")
RESOLUTIONS = ("highest", "lowest-direct")
HEAD = "| Python | versions | torch | result |\n|---|---|---|---|"
FIT = (
    "fit --model Classifier --model.model test_convnext2 --model.num_classes 10 --model.image_size 32 "
    "--data DigitsData --data.batch_size 8 --trainer.callbacks SavePretrained --trainer.max_steps 2 "
    "--trainer.limit_val_batches 2 --trainer.logger false --trainer.accelerator cpu --trainer.default_root_dir run"
)
IMPORTS = """
from featinv_pl import Backbone, FeatInvPipeline, Inverter, Sampler
backbone = Backbone("run/model")
assert backbone.num_classes == 10, backbone.num_classes
assert callable(FeatInvPipeline.from_pretrained)
"""


def build(folder: Path) -> tuple[Path, Path]:
    """Build wheel and sdist into a folder, and check what they hold."""
    _run("uv", "build", "--quiet", "--clear", "--out-dir", str(folder), str(PROJECT))
    [wheel], [sdist] = folder.glob("*.whl"), folder.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as opened:
        held = {name for name in opened.namelist() if ".dist-info/" not in name}
        [metadata] = (name for name in opened.namelist() if name.endswith("/METADATA"))
        said = opened.read(metadata).decode()
    files = {path for path in SOURCE.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    ours = {path.relative_to(SOURCE).as_posix() for path in files if ".egg-info/" not in str(path)}
    assert held == ours, f"the wheel lacks {sorted(ours - held)} and holds {sorted(held - ours)}"
    for field in ("Author", "Keywords", "License-Expression", "License-File", "Project-URL", "Requires-Python"):
        assert f"\n{field}: " in said, f"the wheel's metadata lack {field}"
    with tarfile.open(sdist) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    assert names >= {"LICENSE", "README.md", "pyproject.toml", *(f"src/{name}" for name in ours)}
    return wheel, sdist


def try_out(binaries: Path, folder: Path) -> None:
    """Run what is installed in an environment, whose `bin` is given, as a user does first, in an empty folder."""
    environment = {"PATH": f"{binaries}:{os.environ['PATH']}", "HOME": str(folder), "HF_HUB_OFFLINE": "1"}
    environment |= {"WANDB_MODE": "offline", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    version = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["version"]
    command = str(binaries / "featinv-pl")
    run: dict[str, Any] = {"cwd": folder, "env": environment}
    assert version in _run(command, "--version", **run)
    assert "reconstruct" in _run(command, "--help", **run)
    _run(command, *shlex.split(FIT), **run)
    _run(str(binaries / "python"), "-I", "-c", IMPORTS, **run)


def dist(flags: list[str], shared: bool) -> str:
    """Build into `dist/`, install the wheel into an empty environment, or with this one's libraries, and try it."""
    wheel, sdist = build(Path("dist").absolute())
    with tempfile.TemporaryDirectory() as made:
        empty, folder = Path(made) / "environment", Path(made) / "folder"
        folder.mkdir()
        _run(sys.executable, "-m", "venv", str(empty))
        constraints = ["--constraint", str(PROJECT / "constraints.txt")]
        pip = [str(empty / "bin/python"), "-m", "pip", "install", "--quiet", *flags]
        if shared:
            [packages] = empty.glob("lib/python*/site-packages")
            found = [path for path in sys.path if path.endswith("site-packages")]
            (packages / "borrowed.pth").write_text("\n".join([*found, ""]))
            _run(*pip, "--no-deps", str(wheel))
        else:
            _run(*pip, *constraints, str(wheel))
        try_out(empty / "bin", folder)
    return f"{wheel.name} and {sdist.name} are in dist/, and the wheel works " + (
        "with the libraries of .venv." if shared else "in an empty environment."
    )


def matrix(pythons: list[str], resolutions: list[str], resolve_only: bool) -> Iterator[str]:
    """The rows of a table: what each Python does with the newest and the oldest versions that the bounds allow."""
    with tempfile.TemporaryDirectory() as made:
        wheel = None if resolve_only else build(Path(made))[0]
        for python, resolution in product(pythons, resolutions):
            versions = "oldest" if resolution.startswith("lowest") else "newest"
            try:
                torch = _attempt(wheel, python, resolution) if wheel else _resolve(python, resolution)
                result = "good" if wheel else "resolved"
            except AssertionError as error:
                torch, result = "", f"FAILED: {' '.join(str(error).split())[-600:]}"
            yield f"| {python} | {versions} | {torch} | {result} |"


def _resolve(python: str, resolution: str) -> str:
    extras = [word for extra in EXTRAS for word in ("--extra", extra)]
    found = _run(
        "uv", "pip", "compile", "--quiet", "--no-build", "--no-header", "--no-annotate", *extras,
        "--python-version", python, "--resolution", resolution, str(PROJECT / "pyproject.toml"),
    )  # fmt: skip
    return next(line.removeprefix("torch==") for line in found.splitlines() if line.startswith("torch=="))


def _attempt(wheel: Path, python: str, resolution: str) -> str:
    with tempfile.TemporaryDirectory() as made:
        empty, folder = Path(made) / "environment", Path(made) / "folder"
        folder.mkdir()
        _run("uv", "venv", "--quiet", "--python", python, str(empty))
        install = ["uv", "pip", "install", "--quiet", "--no-build", "--python", str(empty / "bin/python")]
        extras = [word for extra in EXTRAS for word in ("--extra", extra)]
        _run(*install, "--resolution", resolution, *extras, "--requirements", str(PROJECT / "pyproject.toml"))
        _run(*install, "--no-deps", str(wheel))
        try_out(empty / "bin", folder)
        return _run(str(empty / "bin/python"), "-c", "import torch; print(torch.__version__)").strip()


def _run(*command: str, **options: Any) -> str:
    """What a command prints; an assertion fails with the end of it if the command does."""
    if command[0] == "uv":
        command = (sys.executable, "-m", *command)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    assert done.returncode == 0, f"{shlex.join(command)[:200]}: {done.stdout[-1500:]}"
    printed: str = done.stdout
    return printed


def main() -> None:
    parser = argparse.ArgumentParser("installs", description=__doc__)
    parser.add_argument("what", choices=("dist", "matrix"))
    parser.add_argument("--short", action="store_true", help="dist: on the libraries of .venv; matrix: only resolve")
    parser.add_argument("--pip", type=shlex.split, default=[], help="flags of pip, for dist")
    parser.add_argument("--python", action="append", help=f"for matrix; all of {', '.join(PYTHONS)} without it")
    parser.add_argument("--resolution", action="append", choices=RESOLUTIONS, help="for matrix; both without it")
    options = parser.parse_args()
    if options.what == "dist":
        print(dist(options.pip, options.short))
        return
    print(HEAD, flush=True)
    failed = False
    for row in matrix(options.python or [*PYTHONS], options.resolution or [*RESOLUTIONS], options.short):
        print(row, flush=True)
        failed |= "FAILED" in row
    sys.exit(failed)


if __name__ == "__main__":
    main()
