"""One run of a sweep, started by W&B's own agent, which takes its orders from the server of the tests."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from smoke.acts import EXPERIMENTS
from wandb_server import serve


def trial(name: str, overlay: str) -> str:
    """Let an agent run the first values of a sweep, with an overlay over the run's configuration."""
    sweep = yaml.safe_load((EXPERIMENTS / name).read_text())
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("WANDB_")},
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "WANDB_SILENT": "true",
        "FEATINV_CONFIG": overlay,
    }
    shutil.rmtree("runs/featinv-pl", ignore_errors=True)  # each server of the tests gives its first run the same name
    with serve() as server:
        environment |= server.environment()
        server.proposals = [proposal(sweep)]
        _wandb(["sweep", str(EXPERIMENTS / name)], environment)
        [running] = server.sweeps
        log = _wandb(["agent", f"we/featinv-pl/{running}"], environment)
        [run] = server.runs.values()
    assert run.exit_code == 0, f"the run ended with {run.exit_code}: {log[-500:]}"
    assert run.values(sweep["metric"]["name"]), f"no {sweep['metric']['name']}"
    return f"wandb sweep of {name}, wandb agent: one run, {sweep['command'][2]}"


def proposal(sweep: dict[str, Any]) -> dict[str, Any]:
    """The first values that a sweep may try."""
    given = sweep["parameters"]
    return {option: one["values"][0] if "values" in one else one["min"] for option, one in given.items()}


def _wandb(words: list[str], environment: dict[str, str]) -> str:
    command = [sys.executable, "-m", "wandb", *words]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-500:]
    return done.stdout
