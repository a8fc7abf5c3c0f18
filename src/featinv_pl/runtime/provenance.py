"""What a run was made from, besides its configuration: the code, the data, and for scores the model."""

import subprocess
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from typing_extensions import TypedDict  # that of Python 3.11 is too old for pydantic

from featinv_pl.data.shards.manifest import seal
from featinv_pl.inverter.identity import sampling

PACKAGE = Path(__file__).parents[1]


class Checkpoint(TypedDict):
    """The trained half that was scored."""

    path: str | None
    """None for weights that no checkpoint of this command holds."""
    step: int
    digest: str
    """Of the trained weights, wherever they are stored."""


class Evaluation(TypedDict):
    """Where scores come from."""

    command: str
    """`test` or `validate`."""
    date: str
    checkpoint: Checkpoint
    model: dict[str, Any]
    """See `Inverter.identity`."""
    sampling: dict[str, Any]
    """Precision, seed and samplers."""
    code: dict[str, Any]
    shards: dict[str, str]


def evaluation(trainer: Trainer, module: Any) -> Evaluation:
    """Describe the evaluation that is about to begin.

    Args:
        trainer: Of `validate` or `test`.
        module: The `FeatureInversion`.
    """
    how = sampling(module.inverter, str(trainer.precision))
    path = None if trainer.ckpt_path is None else str(trainer.ckpt_path)
    step = trainer.global_step or module.loaded_step
    samplers = {
        name: asdict(sampler) for name, sampler in {"inversion": module.inverter.sampler, **module.arms}.items()
    }
    code_and_shards = provenance(trainer)
    return {
        "command": str(trainer.state.fn.value) if trainer.state.fn else "",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "checkpoint": {"path": path, "step": step, "digest": how.pop("control")},
        "model": module.inverter.identity(),
        "sampling": {**how, "samplers": samplers},
        "code": code_and_shards["code"],
        "shards": code_and_shards["shards"],
    }


def provenance(trainer: Trainer) -> dict[str, Any]:
    """Version and git state of this package, and the digest of each shard set's manifest."""
    manifests = getattr(getattr(trainer, "datamodule", None), "manifests", {})
    return {
        "code": {"version": version("featinv-pl"), **git_state(PACKAGE)},
        "shards": {str(folder): seal(manifest) for folder, manifest in manifests.items()},
    }


def git_state(folder: Path) -> dict[str, Any]:
    """Commit of a folder under git, and whether its files differ from it; nothing where git knows none of them."""
    try:
        if not _git(folder, "ls-files", "."):  # an installed package may lie in the repository of something else
            return {}
        changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
        return {"commit": _git(folder, "rev-parse", "HEAD"), "dirty": bool(changes)}
    except (OSError, subprocess.CalledProcessError):
        return {}


def _git(folder: Path, *args: str) -> str:
    command = ["git", "-C", str(folder), *args]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
