"""What running a file means for each kind of file: the public command, and a look at what it left.

All paths are relative to a folder in which `experiments` is found, so that files name what others have written there,
as they do for a user.
"""

import json
from pathlib import Path
from typing import Any

import torch
import yaml

from configurations import effective_config
from featinv_pl.__main__ import run
from smoke.targets import make
from smoke.watch import Watch

EXPERIMENTS = Path("experiments")
WATCH = "--trainer.callbacks+=smoke.watch.Watch"


def pretrain(*files: str) -> str:
    """Train a part for two steps; what is saved must be a folder with a configuration."""
    words = configs(*files)
    fit(words, 2)
    saved = list(root_of("fit", words).rglob("config.json"))
    assert saved, f"no model below {root_of('fit', words)}"
    return "fit of 2 steps, a validation, a saved model"


def train(*files: str, root: str = "") -> str:
    """Train for two steps, and go on for a third."""
    words = [*configs(*files), *([f"--trainer.default_root_dir={root}"] if root else [])]
    fit(words, 2)
    checkpoint = checkpoint_of(root_of("fit", words))
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 2
    fit([*words, "--ckpt_path=last", "--trainer.max_steps=3"], 3)
    assert Watch.first == 2, f"it went on from step {Watch.first}"
    return "fit of 2 steps, a validation, a checkpoint, and one step more from there"


def train_and_test(*files: str, root: str = "") -> str:
    """Train as above, and score what is trained."""
    done = train(*files, root=root)
    words = [*configs(*files), *([f"--trainer.default_root_dir={root}"] if root else [])]
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
    settings = settings_of("predict", words)
    [writer] = [one for one in settings["trainer"]["callbacks"] if one["class_path"].endswith(".ShardWriter")]
    root = Path(writer["init_args"]["folder"] or settings["trainer"]["default_root_dir"])
    names = list(sources_of(settings["data"]["init_args"]))
    counts = []
    for name in names:
        manifests = sorted((root / name).rglob("manifest.json"))
        assert manifests, f"no shards in {root / name}"
        counts += [json.loads(path.read_text())["settings"]["samples"] for path in manifests]
    assert min(counts) > 0
    run(["verify", *(str(root / name) for name in names)])
    return f"predict, {sum(counts)} samples of {len(counts)} sources; verify"


def benchmark(*files: str) -> str:
    """Two steps of a benchmark, which saves nothing and does not validate."""
    words = configs(*files)
    run(["fit", *words, WATCH])
    assert Watch.last >= 2
    return f"fit of {Watch.last} steps"


def study(file: str, target: str) -> str:
    """Run a study of one seed, by its make target."""
    plan = yaml.safe_load((EXPERIMENTS / file).read_text())
    short = Path(f"{target}.yaml")
    short.write_text(yaml.safe_dump({**plan, "seeds": plan["seeds"][:1]}, sort_keys=False))
    make(target, STUDY=str(short))
    return f"make {target} SHORT=1 of one seed: {len(plan['runs'])} ways"


# What they share


def configs(*files: str) -> list[str]:
    """Options for files below `experiments`, or of the parts."""
    return [f"--config={file if file.startswith('parts/') else EXPERIMENTS / file}" for file in files]


def fit(words: list[str], steps: int) -> None:
    """Train, to the step that is given, with a validation on the way."""
    run(["fit", *words, WATCH])
    assert Watch.last == steps, f"it ended after step {Watch.last}"
    assert Watch.validations or steps == 3, "no validation"


def score(words: list[str], root: Path) -> None:
    """Test, and look whether every source has scores."""
    run(["test", *words, f"--ckpt_path={checkpoint_of(root)}"])
    scores = json.loads((root / "metrics.json").read_text())["scores"]
    sources = settings_of("test", words)["data"]["init_args"]["test"]
    missing = [source for source in sources if not any(f"{name}/".startswith(f"{source}/") for name in scores)]
    assert not missing, f"no scores of {missing}"


def checkpoint_of(root: Path) -> Path:
    """The checkpoint of the end of training."""
    [checkpoint] = root.rglob("inversion.ckpt")
    return checkpoint


def root_of(command: str, words: list[str]) -> Path:
    """Where a run leaves all that it writes."""
    return Path(settings_of(command, words)["trainer"]["default_root_dir"])


def sources_of(given: dict[str, Any]) -> dict[str, Any]:
    """The sources that settings of data name, with their folders if they have any."""
    if "data" in given:  # of which these are corrupted versions
        return {f"{name}-corrupted": folder for name, folder in sources_of(given["data"]["init_args"]).items()}
    return given["predict"] if "predict" in given else dict.fromkeys(given["sources"])


def settings_of(command: str, words: list[str]) -> Any:
    """The configuration that a command line amounts to."""
    return effective_config([command, *words])
