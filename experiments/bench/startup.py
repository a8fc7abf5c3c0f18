"""How long the command takes to say that something is wrong."""

import subprocess
import sys
from pathlib import Path
from statistics import median

from bench import machine

BASE = "import torch, lightning"
WRONG = "model: {class_path: FeatureInversion, init_args: {backbonne: resnet50}}\n"


def measure(rounds: int, folder: Path) -> dict[str, float]:
    """Seconds of each command, the median of several rounds, in turn."""
    (folder / "wrong.yaml").write_text(WRONG)
    command = [sys.executable, "-m", "featinv_pl"]
    commands = {
        f'python -c "{BASE}"': [sys.executable, "-c", BASE],
        "featinv-pl --help": [*command, "--help"],
        "featinv-pl fit --config wrong.yaml": [*command, "fit", "--config", str(folder / "wrong.yaml")],
        "featinv-pl fit --trainer.max_stepz 3": [*command, "fit", "--trainer.max_stepz", "3"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, words in commands.items():
            seconds[name].append(machine.timed(lambda words=words: subprocess.run(words, capture_output=True)))  # type: ignore[misc]
    return {name: median(taken) for name, taken in seconds.items()}
