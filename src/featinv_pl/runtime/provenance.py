"""Provenance of a run besides its configuration: code and data."""

import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from featinv_pl.data.shards.manifest import seal

PACKAGE = Path(__file__).parents[1]


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
