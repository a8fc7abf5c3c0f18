"""What running a file means for each kind of file: the public command, and a look at what it left.

All paths are relative to a folder in which `experiments` is found, so that files name what others have written there,
as they do for a user.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from configurations import effective_config
from featinv_pl.__main__ import run
from smoke.targets import make
from wandb_server import serve

EXPERIMENTS = Path("experiments")


def pretrain(*files: str) -> str:
    """Train a part for two steps; what is saved must be a folder with a configuration."""
    words = configs(*files)
    run(["fit", *words])
    assert list(root_of("fit", words).rglob("config.json")), f"no model below {root_of('fit', words)}"
    return "fit of 2 steps, a validation, a saved model"


def train(*files: str, root: str = "") -> str:
    """Train for two steps, and resume for a third."""
    words = configs(*files, root=root)
    run(["fit", *words])
    assert torch.load(checkpoint_of(root_of("fit", words)), weights_only=True)["global_step"] == 2
    run(["fit", *words, "--ckpt_path=last", "--trainer.max_steps=3"])
    return "fit of 2 steps, a validation, a checkpoint, and one step more from there"


def train_and_test(*files: str, root: str = "") -> str:
    """Train as above, and score what is trained."""
    done = train(*files, root=root)
    words = configs(*files, root=root)
    score(words, root_of("fit", words))
    return f"{done}; test"


def test(*files: str, root: str) -> str:
    """Score what is trained in `root`, whose own configuration lies beneath."""
    score([f"--config={root}/fit.yaml", *configs(*files)], Path(root))
    return f"test of {root}"


def extract(*files: str) -> str:
    """Extract features, and check every shard."""
    words = configs(*files)
    run(["predict", *words])
    settings = effective_config(["predict", *words])
    [writer] = [one for one in settings["trainer"]["callbacks"] if one["class_path"].endswith(".ShardWriter")]
    root = Path(writer["init_args"]["folder"] or settings["trainer"]["default_root_dir"])
    names = list(sources_of(settings["data"]["init_args"]))
    manifests = {name: sorted((root / name).rglob("manifest.json")) for name in names}
    assert all(manifests.values()), f"no shards of some of {names} in {root}"
    counts = [json.loads(path.read_text())["settings"]["samples"] for paths in manifests.values() for path in paths]
    assert min(counts) > 0
    run(["verify", *(str(root / name) for name in names)])
    return f"predict, {sum(counts)} samples of {len(counts)} sources; verify"


def benchmark(*files: str) -> str:
    """Two steps, nothing saved and no validation."""
    run(["fit", *configs(*files)])
    return "fit of 2 steps"


def study(file: str, target: str) -> str:
    """Run a study of one seed, by its make target."""
    plan = yaml.safe_load((EXPERIMENTS / file).read_text())
    short = Path(f"{target}.yaml")
    short.write_text(yaml.safe_dump({**plan, "seeds": plan["seeds"][:1]}, sort_keys=False))
    make(target, STUDY=str(short))
    return f"make {target} SHORT=1 of one seed: {len(plan['runs'])} ways"


def sweep(file: str, overlay: str) -> str:
    """Let W&B's own agent, whose orders come from the server of the tests, run the first values of a sweep."""
    plan = yaml.safe_load((EXPERIMENTS / file).read_text())
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("WANDB_")},
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "WANDB_SILENT": "true",
        "FEATINV_CONFIG": overlay,
    }
    shutil.rmtree("runs/featinv-pl", ignore_errors=True)  # each server of the tests gives its first run the same name
    with serve() as server:
        environment |= server.environment()
        server.proposals = [proposal(plan)]
        wandb(["sweep", str(EXPERIMENTS / file)], environment)
        [running] = server.sweeps
        log = wandb(["agent", f"we/featinv-pl/{running}"], environment)
        [trial] = server.runs.values()
    assert trial.exit_code == 0, f"the run ended with {trial.exit_code}: {log[-500:]}"
    assert trial.values(plan["metric"]["name"]), f"no {plan['metric']['name']}"
    return f"wandb sweep of {file}, wandb agent: one run, {plan['command'][2]}"


# What they share


def proposal(plan: dict[str, Any]) -> dict[str, Any]:
    """The first values that a sweep may try."""
    parameters = plan["parameters"].items()
    return {option: one["values"][0] if "values" in one else one["min"] for option, one in parameters}


def wandb(words: list[str], environment: dict[str, str]) -> str:
    command = [sys.executable, "-m", "wandb", *words]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-500:]
    return done.stdout


def configs(*files: str, root: str = "") -> list[str]:
    """Options for files below `experiments`, or of the parts, and for another folder."""
    found = [f"--config={file if file.startswith('parts/') else EXPERIMENTS / file}" for file in files]
    return [*found, *([f"--trainer.default_root_dir={root}"] if root else [])]


def score(words: list[str], root: Path) -> None:
    """Test, and look whether every source has scores."""
    run(["test", *words, f"--ckpt_path={checkpoint_of(root)}"])
    scores = json.loads((root / "metrics.json").read_text())["scores"]
    sources = effective_config(["test", *words])["data"]["init_args"]["test"]
    missing = [source for source in sources if not any(f"{name}/".startswith(f"{source}/") for name in scores)]
    assert not missing, f"no scores of {missing}"


def checkpoint_of(root: Path) -> Path:
    [checkpoint] = root.rglob("inversion.ckpt")
    return checkpoint


def root_of(command: str, words: list[str]) -> Path:
    return Path(effective_config([command, *words])["trainer"]["default_root_dir"])


def sources_of(given: dict[str, Any]) -> dict[str, Any]:
    """The sources that settings of data name, with their folders if they have any."""
    if "data" in given:  # of which these are corrupted versions
        return {f"{name}-corrupted": folder for name, folder in sources_of(given["data"]["init_args"]).items()}
    named = given.get("predict") or given["sources"]
    return named if isinstance(named, dict) else dict.fromkeys(named)
