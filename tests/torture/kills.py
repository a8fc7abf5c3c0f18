"""SIGKILL at any moment, or a full disk, and the same command again: its result must be as if nothing had happened."""

import json
import random
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiny import extraction, inversion, make_classifier, make_prior, write
from torture.observers import ROWS, SEEN, lines
from torture.processes import TWO, moments, run
from torture.table import Figure

STEPS = 12  # of epochs of four, of which every second is saved and every third validated
PATH = "run/inversion.ckpt"
ONE_LINE = r"featinv-pl: error: .*'.*(File too large|No space left)"  # and the name of the file
LEAST = 20_000  # bytes: what commands print and note goes to files too


def prepare(root: Path) -> Path:
    """A folder of networks, shards and configurations for all that follows."""
    root.mkdir(parents=True, exist_ok=True)
    classifier, prior = make_classifier(root), make_prior(root)
    extract = extraction(classifier, prior, ["train", "val"])
    extract["trainer"] |= {"enable_progress_bar": False, "limit_predict_batches": 11}
    extract["trainer"]["callbacks"][0]["init_args"]["shard_size"] = 14
    extract["data"]["init_args"]["batch_size"] = 7  # 77 samples, which two ranks cannot share evenly
    write(root / "extract.yaml", extract)

    fit = inversion(classifier, prior)
    last = {"filename": "inversion", "every_n_train_steps": 2, "enable_version_counter": False}
    best = {"dirpath": "run/best", "filename": "best", "monitor": "val/loss", "enable_version_counter": False}
    fit["trainer"] |= {
        "enable_progress_bar": False,
        "max_steps": STEPS,
        "val_check_interval": 3,
        "check_val_every_n_epoch": None,
        "log_every_n_steps": 1,
        "gradient_clip_val": 1.0,
        "logger": {"class_path": "torture.observers.Rows"},
        "callbacks": [
            {"class_path": "torture.observers.Recorder"},
            {"class_path": "MovingAverage", "init_args": {"decay": 0.5}},
            {"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss", "patience": 100}},
            {"class_path": "ModelCheckpoint", "init_args": last},
            {"class_path": "ModelCheckpoint", "init_args": best},
        ],
    }
    fit["model"]["init_args"]["lr_scheduler"] = {
        "class_path": "torch.optim.lr_scheduler.OneCycleLR",
        "init_args": {"max_lr": 0.01, "total_steps": STEPS},
    }
    fit["data"]["init_args"] |= {"batch_size": 16, "num_workers": 2, "test": {"val": "shards/val"}}
    write(root / "fit.yaml", fit)

    test = inversion(classifier, prior)
    test["trainer"] |= {
        "enable_progress_bar": False,
        "callbacks": [
            {"class_path": "torture.observers.Recorder"},
            {"class_path": "Evaluation", "init_args": {"num_images": 0}},
        ],
    }
    test["data"]["init_args"] |= {"batch_size": 8, "test": {"val": "shards/val", "train": "shards/train"}}
    write(root / "test.yaml", test)
    shutil.rmtree(root / "shards", ignore_errors=True)
    run(["predict", "--config", "extract.yaml"], root)
    return root


@dataclass
class Stage:
    """A command that is interrupted: how much it has done in a folder, and what it leaves there in the end."""

    name: str
    args: Sequence[str]
    marks: Callable[[Path], int]
    left: Callable[[Path], Any]
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


def stages() -> list[Stage]:
    fit = ("fit", "--config", "fit.yaml", "--ckpt_path", "last")
    two = (*fit, *TWO, "--data.batch_size=8", "--data.num_workers=1")
    predict = ("predict", "--config", "extract.yaml")
    return [
        Stage("fit", fit, lambda folder: len(samples(folder)), trained),
        Stage("fit", two, lambda folder: len(samples(folder)), trained, ranks=2),
        Stage("predict", predict, shards, extracted),
        Stage("predict", (*predict, *TWO), shards, extracted, ranks=2),
        Stage("test", ("test", "--config", "test.yaml"), batches, scores),
    ]


def kill_stage(root: Path, stage: Stage, kills: int, rng: random.Random) -> Figure:
    """Kill a command and start it again until it is done; compare with one that nobody has killed."""
    undisturbed = stage.place(root, "undisturbed")
    run(stage.args, undisturbed)
    expected, total = stage.left(undisturbed), stage.marks(undisturbed)
    done = wrong = rounds = partly = 0
    while done < kills:
        folder = stage.place(root, str(rounds))
        rounds += 1
        for moment in islice(moments(partial(stage.marks, folder), total, folder, rng), kills - done):
            partly += stage.marks(folder) > 0
            if run(stage.args, folder, moment) is not None:
                break
            done += 1
        else:
            run(stage.args, folder)
        wrong += differ(folder, stage.left(folder), expected)
    note = f"{partly} with work done before; {rounds} finished runs, the same to the bit"
    return Figure(stage.name, f"kill -9, {stage.ranks} process{'es' * (stage.ranks > 1)}", done, wrong, note)


def fill_disk(root: Path, stage: Stage, times: int, rng: random.Random) -> Figure:
    """Run a command whose files can grow only so large, then the same command with room; compare likewise."""
    undisturbed = stage.place(root, "undisturbed")
    run(stage.args, undisturbed)
    expected, largest = stage.left(undisturbed), max(map(len, files(undisturbed).values()))
    wrong = 0
    for number in range(times):
        folder = stage.place(root, f"full-{number}")
        run(stage.args, folder, expected=1, largest=rng.randrange(LEAST, largest))
        said = (folder / "output.txt").read_text()
        wrong += "Traceback" in said or not re.search(ONE_LINE, said)
        run(stage.args, folder)
        wrong += differ(folder, stage.left(folder), expected)
    return Figure(stage.name, "disk full", times, wrong, "one line each, and the same command resumes")


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, except configurations."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".yaml"
    }


def shards(folder: Path) -> int:
    return len(list(folder.glob("shards/*/*.tar")))


def extracted(folder: Path) -> dict[str, bytes]:
    return files(folder / "shards")


def batches(folder: Path) -> int:
    return len(list(folder.glob("run/reconstructions/*.safetensors")))


def scores(folder: Path) -> dict[str, Any]:
    """What a test writes, but its date. How its images are shared out among files depends on where it was stopped."""
    found: dict[str, Any] = {
        n: data for n, data in files(folder / "run").items() if not n.startswith("reconstructions/")
    }
    found["metrics.json"] = json.loads(found["metrics.json"])
    del found["metrics.json"]["provenance"]["date"]
    return found


def trained(folder: Path) -> dict[str, Any]:
    """All that a training leaves, and all that it has ever logged and read, which must be the same each time."""
    checkpoint = torch.load(folder / PATH, weights_only=True)
    state = {name: checkpoint[name] for name in ("state_dict", "current_model_state", "averaging_state")}
    state |= {name: checkpoint[name] for name in ("optimizer_states", "lr_schedulers", "global_step", "epoch")}
    state["order"], state["random"] = checkpoint["FeatureShards"], checkpoint["unfinished"]["random"]
    states = checkpoint["callbacks"].items()
    state["stopping"] = [value for name, value in states if name.startswith("EarlyStopping")]
    state["best"] = torch.load(folder / "run/best/best.ckpt", weights_only=True)["state_dict"]
    state["rows"] = {}
    for step, metrics in lines(folder / ROWS):
        for name, value in metrics.items():
            state["rows"].setdefault(f"{step} {name}", set()).add(value)
    state["seen"] = [samples(folder, rank) for rank in range(2)]
    return state


def samples(folder: Path, rank: int = 0) -> dict[str, set[str]]:
    """All that were ever read in each step and in its validation."""
    seen: dict[str, set[str]] = {}
    for stage, step, keys in lines(folder / SEEN.format(rank)):
        seen.setdefault(f"{stage} {step}", set()).update(keys)
    return seen


def differ(folder: Path, left: Any, expected: Any) -> bool:
    if (difference := unlike(left, expected)) is not None:
        print(f"{folder}: {difference}", file=sys.stderr)
    return difference is not None


def unlike(one: Any, other: Any, name: str = "") -> str | None:
    """The name of the first thing that two states differ in, to the bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return f"{name}: {sorted(map(str, one.keys() ^ other.keys()))}"
        pairs = [(f"{name}/{key}", one[key], other[key]) for key in one]
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        pairs = [(f"{name}/{number}", *pair) for number, pair in enumerate(zip(one, other, strict=True))]
    else:
        same = torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else one == other
        return None if same else f"{name}: {one} and {other}"
    return next((found for key, left, right in pairs if (found := unlike(left, right, key)) is not None), None)
