"""Public commands that need not run again if nothing has changed since they did."""

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from featinv_pl.cli import effective_config, train
from featinv_pl.files import read_json, write_bytes

STAGES = "stages.json"


@dataclass(frozen=True)
class Stage:
    """One public command.

    Attributes:
        name: What the stage is called in the records of its folder.
        command: The command line after `featinv-pl`.
        outputs: What it leaves; removed before it runs again.
        fingerprint: What its result depends on.
    """

    name: str
    command: tuple[str, ...]
    outputs: tuple[Path, ...]
    fingerprint: str


def fingerprint(command: Sequence[str], *needed: str) -> str:
    """What a stage's result depends on: its whole configuration, what it reads, and the package.

    Args:
        command: The command line.
        needed: Fingerprints of what it reads.
    """
    parts = [version("featinv-pl"), effective_config(list(command)), *needed]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def run_once(stage: Stage, folder: Path) -> tuple[bool, float]:
    """Run a stage unless its last run had the same fingerprint and its outputs are there.

    Args:
        stage: What to run.
        folder: Holds the records of the stages that belong together.

    Returns:
        Whether it was done before, and the seconds that it takes or took.
    """
    records = read_records(folder)
    record = records.pop(stage.name, {})
    if record.get("fingerprint") == stage.fingerprint and all(path.exists() for path in stage.outputs):
        return True, record["seconds"]
    _write_records(folder, records)  # first, so that an interrupted stage does not pass for done
    for path in stage.outputs:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    start = time.monotonic()
    train(list(stage.command))
    seconds = time.monotonic() - start
    record = {"command": " ".join(["featinv-pl", *stage.command]), "seconds": seconds, "fingerprint": stage.fingerprint}
    _write_records(folder, {**records, stage.name: record})
    return False, seconds


def read_records(folder: Path) -> dict[str, dict[str, Any]]:
    """What the stages of a folder have left: by name their command, seconds and fingerprint."""
    path = folder / STAGES
    return read_json(path, "stages", "Remove it, so that all stages run again.") if path.is_file() else {}


def minutes(seconds: float) -> str:
    """A duration for people."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"


def _write_records(folder: Path, records: dict[str, dict[str, Any]]) -> None:
    write_bytes(folder / STAGES, json.dumps(records, indent=2).encode())
