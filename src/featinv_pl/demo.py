"""The whole job on handwritten digits, by the public commands, one after the other."""

import hashlib
import json
import os
import shlex
import shutil
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from featinv_pl.callbacks.files import write_bytes
from featinv_pl.cli import effective_config, train
from featinv_pl.errors import UserError
from featinv_pl.viz.report import STAGES, report

RUNS = Path("runs/demo")
EXPERIMENTS = Path("experiments/digits")


@dataclass(frozen=True)
class Stage:
    """One public command.

    Attributes:
        name: What the stage is called in the report.
        command: The command line after `featinv-pl`.
        outputs: What it leaves below the folder of runs; removed before it runs again.
        needs: Names of the stages whose outputs it reads.
    """

    name: str
    command: str
    outputs: tuple[str, ...]
    needs: tuple[str, ...] = ()


def _inverter(name: str) -> tuple[Stage, Stage]:
    config, folder = f"--config {EXPERIMENTS}/{name}.yaml", f"{RUNS}/{name}"
    return (
        Stage(f"{name} inverter", f"fit {config}", (f"{name}/inversion.ckpt",), ("prior", "shards")),
        Stage(
            f"{name} test",
            f"test {config} --ckpt_path {folder}/inversion.ckpt",
            tuple(f"{name}/{output}" for output in ("metrics.json", "scores.csv", "samples", "plots", "pictures")),
            (f"{name} inverter", "adversarial shards"),
        ),
    )


PIPELINE = (
    Stage("classifier", f"fit --config {EXPERIMENTS}/classifier.yaml", ("classifier",)),
    Stage("autoencoder", f"fit --config {EXPERIMENTS}/autoencoder.yaml", ("autoencoder",)),
    Stage("prior", f"fit --config {EXPERIMENTS}/prior.yaml", ("prior",), ("autoencoder",)),
    Stage("shards", f"predict --config {EXPERIMENTS}/extract.yaml", ("shards",), ("classifier", "prior")),
    Stage(
        "adversarial shards",
        f"predict --config {EXPERIMENTS}/adversarial.yaml",
        ("shards/adversarial",),
        ("classifier", "prior", "shards"),
    ),
    *_inverter("spatial"),
    *_inverter("pooled"),
)


def demo(fresh: bool = False, config: Path | None = None) -> None:
    """Train a classifier, a prior and two inverters on handwritten digits, and score them.

    Stages that are done, and whose configuration has not changed, are reused.

    Args:
        fresh: Start over.
        config: An overlay for every stage, such as experiments/debug.yaml.
    """
    if not EXPERIMENTS.is_dir():
        raise UserError(f"demo: there is no folder '{EXPERIMENTS}' here. Run it from the project's folder.")
    for name, value in (("WANDB_SILENT", "true"), ("WANDB_MODE", "offline")):  # nobody asked to publish a demo
        os.environ.setdefault(name, value)
    overlay = [] if config is None else ["--config", str(config)]
    commands = {stage.name: [*shlex.split(stage.command), *overlay] for stage in PIPELINE}
    fingerprints: dict[str, str] = {}
    for stage in PIPELINE:  # a mistake in a configuration shows before anything is removed or run
        needed = [fingerprints[name] for name in stage.needs]
        fingerprints[stage.name] = _fingerprint(commands[stage.name], needed)
    if fresh:
        shutil.rmtree(RUNS, ignore_errors=True)
    start, last = time.monotonic(), len(PIPELINE) + 1
    for number, stage in enumerate(PIPELINE, 1):
        print(f"[{number}/{last}] featinv-pl {shlex.join(commands[stage.name])}", flush=True)
        _run_once(stage, commands[stage.name], fingerprints[stage.name])
    print(f"[{last}/{last}] featinv-pl report {RUNS}", flush=True)
    report(RUNS)
    print(f"Done in {_minutes(time.monotonic() - start)}. Open {RUNS / 'report.html'}.")


def _run_once(stage: Stage, command: list[str], fingerprint: str) -> None:
    """Run a stage unless its last run had the same fingerprint and its outputs are there."""
    records = _records()
    record = records.pop(stage.name, {})
    outputs = [RUNS / output for output in stage.outputs]
    if record.get("fingerprint") == fingerprint and all(path.exists() for path in outputs):
        print(f"      reused, done before in {_minutes(record['seconds'])}", flush=True)
        return
    _write_records(records)  # first, so that an interrupted stage does not pass for done
    for path in outputs:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    start = time.monotonic()
    train(command)
    seconds = time.monotonic() - start
    record = {"command": f"featinv-pl {stage.command}", "seconds": seconds, "fingerprint": fingerprint}
    _write_records({**records, stage.name: record})
    print(f"      done in {_minutes(seconds)}", flush=True)


def _records() -> dict[str, dict[str, Any]]:
    path = RUNS / STAGES
    records: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else {}
    return records


def _write_records(records: dict[str, dict[str, Any]]) -> None:
    write_bytes(RUNS / STAGES, json.dumps(records, indent=2).encode())


def _fingerprint(command: list[str], needed: list[str]) -> str:
    """What a stage's result depends on: its whole configuration, what it reads, and the package."""
    parts = [version("featinv-pl"), effective_config(command), *needed]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"
