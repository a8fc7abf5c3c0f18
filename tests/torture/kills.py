"""SIGKILL at any moment, or a full disk, and the same command again: its result must be as if nothing had happened."""

import json
import random
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from tiny import extraction, inversion, make_classifier, make_prior, write
from torture import Figure
from torture.processes import ROWS, SEEN, TWO, lines, moments, run
from trainings import short

STEPS = 12  # of epochs of four, of which every second is saved and every third validated
ONE_LINE = r"featinv-pl: error: .*'.*(File too large|No space left)"  # and the name of the file
LEAST = 20_000  # bytes: what commands print and note goes to files too
WEIGHTS = ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers")


def prepare(root: Path) -> Path:
    """A folder of networks, shards and configurations for all that follows."""
    root.mkdir(parents=True, exist_ok=True)
    classifier, prior = make_classifier(root), make_prior(root)
    extract = extraction(classifier, prior, ["train", "val"])
    extract["trainer"] |= {"enable_progress_bar": False, "limit_predict_batches": 11}
    extract["trainer"]["callbacks"][0]["init_args"]["shard_size"] = 14
    extract["data"]["init_args"]["batch_size"] = 7  # 77 samples, which two ranks cannot share evenly

    recorder = {"class_path": "torture.processes.Recorder"}
    fit = short(classifier, prior, Path("shards"))
    fit["trainer"] |= {"max_steps": STEPS, "val_check_interval": 3, "log_every_n_steps": 1, "gradient_clip_val": 1.0}
    fit["trainer"]["logger"] = {"class_path": "torture.processes.Rows"}
    best = {"dirpath": "run/best", "filename": "best", "monitor": "val/loss", "enable_version_counter": False}
    fit["trainer"]["callbacks"] += [
        recorder,
        {"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss", "patience": 100}},
        {"class_path": "ModelCheckpoint", "init_args": best},
    ]
    schedule = {"max_lr": 0.01, "total_steps": STEPS}
    fit["model"]["init_args"]["lr_scheduler"] = {
        "class_path": "torch.optim.lr_scheduler.OneCycleLR",
        "init_args": schedule,
    }
    fit["data"]["init_args"]["num_workers"] = 2

    test = inversion(classifier, prior)
    evaluation = {"class_path": "Evaluation", "init_args": {"num_images": 0}}
    test["trainer"] |= {"enable_progress_bar": False, "callbacks": [recorder, evaluation]}
    test["data"]["init_args"] |= {"batch_size": 8, "test": {"val": "shards/val", "train": "shards/train"}}
    for name, settings in (("extract", extract), ("fit", fit), ("test", test)):
        write(root / f"{name}.yaml", settings)
    run(["predict", "--config", "extract.yaml"], root)
    return root


@dataclass(frozen=True)
class Stage:
    """A command that is interrupted: how much it has done in a folder, and what it leaves there in the end."""

    name: str
    args: tuple[str, ...]
    marks: Callable[[Path], int]
    left: Callable[[Path], dict[str, Any]]
    ranks: int = 1

    def place(self, root: Path, name: str) -> Path:
        """A folder with the configurations, and with the shards if they are not what is made."""
        folder = root / f"{self.name}-{self.ranks}-{name}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for config in root.glob("*.yaml"):
            shutil.copy(config, folder)
        if self.name != "predict":
            (folder / "shards").symlink_to(root / "shards")
        return folder


@cache
def undisturbed(root: Path, stage: Stage) -> tuple[dict[str, Any], int, int]:
    """What a command leaves that nothing happens to, its marks, and the size of its largest file."""
    folder = stage.place(root, "undisturbed")
    run(stage.args, folder)
    return stage.left(folder), stage.marks(folder), max(map(len, files(folder).values()))


def kill_stage(root: Path, stage: Stage, kills: int, rng: random.Random) -> Figure:
    """Kill a command and start it again until it is done; compare with one that nobody has killed."""
    expected, total, _ = undisturbed(root, stage)
    done = wrong = rounds = partly = 0
    while done < kills:
        folder = stage.place(root, str(rounds))
        rounds += 1
        for moment in islice(moments(partial(stage.marks, folder), total, folder, rng), kills - done):
            partly += stage.marks(folder) > 0
            if run(stage.args, folder, moment):
                break
            done += 1
        else:
            run(stage.args, folder)
        wrong += differ(folder, stage.left(folder), expected)
    note = f"{partly} with work done before; {rounds} finished runs, the same to the bit"
    return Figure(stage.name, f"kill -9, {stage.ranks} process{'es' * (stage.ranks > 1)}", done, wrong, note)


def fill_disk(root: Path, stage: Stage, times: int, rng: random.Random) -> Figure:
    """Run a command whose files can grow only so large, then the same command with room; compare likewise."""
    expected, _, largest = undisturbed(root, stage)
    wrong = 0
    for number in range(times):
        folder = stage.place(root, f"full-{number}")
        run(stage.args, folder, expected=1, largest=rng.randrange(LEAST, largest))
        said = (folder / "output.txt").read_text()
        wrong += "Traceback" in said or not re.search(ONE_LINE, said)
        run(stage.args, folder)
        wrong += differ(folder, stage.left(folder), expected)
    return Figure(stage.name, "disk full", times, wrong, "one line each, and the same command resumes")


def differ(folder: Path, left: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Whether two states are not the same to the bit."""
    if wrong := [name for name in left.keys() | expected.keys() if left.get(name) != expected.get(name)]:
        print(f"{folder}: {wrong} differ", file=sys.stderr)
    return bool(wrong)


def files(folder: Path) -> dict[str, Any]:
    """Every file below a folder, except configurations."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".yaml"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def scores(folder: Path) -> dict[str, Any]:
    """What a test writes, but its date. How its images are shared out among files depends on where it was stopped."""
    found = {name: data for name, data in files(folder / "run").items() if not name.startswith("reconstructions/")}
    found["metrics.json"] = json.loads(found["metrics.json"])
    del found["metrics.json"]["provenance"]["date"]
    return found


def trained(folder: Path) -> dict[str, Any]:
    """All that a training leaves, and all that it has ever logged and read, which must be the same each time."""
    checkpoint = torch.load(folder / "run/inversion.ckpt", weights_only=True)
    state = {name: checkpoint[name] for name in (*WEIGHTS, "global_step", "epoch", "FeatureShards")}
    state["random"] = checkpoint["unfinished"]["random"]
    states = checkpoint["callbacks"].items()
    state["stopping"] = [value for name, value in states if name.startswith("EarlyStopping")]
    state["best"] = torch.load(folder / "run/best/best.ckpt", weights_only=True)["state_dict"]
    state["rows"] = {}
    for step, metrics in lines(folder / ROWS):
        for name, value in metrics.items():
            state["rows"].setdefault(f"{step} {name}", set()).add(value)
    state["seen"] = [samples(folder, rank) for rank in range(2)]
    plain: dict[str, Any] = tree_map(lambda leaf: leaf.numpy().tobytes() if isinstance(leaf, Tensor) else leaf, state)
    return plain


def samples(folder: Path, rank: int = 0) -> dict[str, set[str]]:
    """All that were ever read in each step and in its validation."""
    seen: dict[str, set[str]] = {}
    for stage, step, keys in lines(folder / SEEN.format(rank)):
        seen.setdefault(f"{stage} {step}", set()).update(keys)
    return seen


def count(pattern: str) -> Callable[[Path], int]:
    return lambda folder: len(list(folder.glob(pattern)))


FIT = ("fit", "--config", "fit.yaml", "--ckpt_path", "last")
PREDICT = ("predict", "--config", "extract.yaml")
MADE: tuple[Any, Any] = (count("shards/*/*.tar"), lambda folder: files(folder / "shards"))
STAGES = (
    Stage("fit", FIT, lambda folder: len(samples(folder)), trained),
    Stage(
        "fit",
        (*FIT, *TWO, "--data.batch_size=8", "--data.num_workers=1"),
        lambda folder: len(samples(folder)),
        trained,
        2,
    ),
    Stage("predict", PREDICT, *MADE),
    Stage("predict", (*PREDICT, *TWO), *MADE, 2),
    Stage("test", ("test", "--config", "test.yaml"), count("run/reconstructions/*.safetensors"), scores),
)
