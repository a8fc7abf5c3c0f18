"""The whole job on handwritten digits, by the public commands, one after the other."""

import os
import shlex
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from featinv_pl.errors import UserError
from featinv_pl.evaluation.report import report
from featinv_pl.stages import Stage, fingerprint, minutes, run_once

RUNS = Path("runs/demo")
EXPERIMENTS = Path("experiments/digits")


@dataclass(frozen=True)
class Step:
    """One public command.

    Attributes:
        name: What the step is called in the report.
        command: The command line after `featinv-pl`.
        outputs: What it leaves below the folder of runs.
        needs: Names of the steps whose outputs it reads.
    """

    name: str
    command: str
    outputs: tuple[str, ...]
    needs: tuple[str, ...] = ()


def _inverter(name: str) -> tuple[Step, Step]:
    config, folder = f"--config {EXPERIMENTS}/{name}.yaml", f"{RUNS}/{name}"
    return (
        Step(f"{name} inverter", f"fit {config}", (f"{name}/inversion.ckpt",), ("prior", "shards")),
        Step(
            f"{name} test",
            f"test {config} --ckpt_path {folder}/inversion.ckpt",
            tuple(f"{name}/{output}" for output in ("metrics.json", "scores.csv", "samples", "plots", "pictures")),
            (f"{name} inverter", "adversarial shards"),
        ),
    )


PIPELINE = (
    Step("classifier", f"fit --config {EXPERIMENTS}/classifier.yaml", ("classifier",)),
    Step("autoencoder", f"fit --config {EXPERIMENTS}/autoencoder.yaml", ("autoencoder",)),
    Step("prior", f"fit --config {EXPERIMENTS}/prior.yaml", ("prior",), ("autoencoder",)),
    Step("shards", f"predict --config {EXPERIMENTS}/extract.yaml", ("shards",), ("classifier", "prior")),
    Step(
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
    stages: dict[str, Stage] = {}
    for step in PIPELINE:  # a mistake in a configuration shows before anything is removed or run
        command = (*shlex.split(step.command), *overlay)
        needed = [stages[name].fingerprint for name in step.needs]
        outputs = tuple(RUNS / output for output in step.outputs)
        stages[step.name] = Stage(step.name, command, outputs, fingerprint(command, *needed))
    if fresh:
        shutil.rmtree(RUNS, ignore_errors=True)
    start, last = time.monotonic(), len(PIPELINE) + 1
    for number, stage in enumerate(stages.values(), 1):
        print(f"[{number}/{last}] featinv-pl {shlex.join(stage.command)}", flush=True)
        reused, seconds = run_once(stage, RUNS)
        print(f"      {'reused, done before' if reused else 'done'} in {minutes(seconds)}", flush=True)
    print(f"[{last}/{last}] featinv-pl report {RUNS}", flush=True)
    report(RUNS)
    print(f"Done in {minutes(time.monotonic() - start)}. Open {RUNS / 'report.html'}.")
