"""SIGKILL at any moment, ranks that end, or a full disk: the same command again must end as if nothing had happened.

Two ranks must also do what one does; and saving is compared with Lightning's own. There, the temporary folder is in
memory as on many machines, so that it is on another file system than the checkpoint.
"""

import json
import math
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO, TorchCheckpointIO
from torch import Tensor
from torch.utils._pytree import tree_map

from featinv_pl.errors import UserError
from featinv_pl.nets.weights import read_checkpoint
from featinv_pl.runtime.checkpoints import AtomicCheckpoints
from tiny import extraction, inversion, joined, make_classifier, make_prior, short, write
from torture import Figure
from torture.processes import PATIENCE_S, ROWS, SEEN, TWO, ended, kill, lines, moments, run, start_as_users_do

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
    stopping = {"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss", "patience": 100}}
    fit["trainer"]["callbacks"] += [recorder, stopping, {"class_path": "ModelCheckpoint", "init_args": best}]
    schedule = {"init_args": {"max_lr": 0.01, "total_steps": STEPS}}
    fit["model"]["init_args"]["lr_scheduler"] = {"class_path": "torch.optim.lr_scheduler.OneCycleLR", **schedule}
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


FIT = Stage("fit", ("fit", "--config", "fit.yaml", "--ckpt_path", "last"), lambda folder: len(samples(folder)), trained)
PREDICT = Stage(
    "predict",
    ("predict", "--config", "extract.yaml"),
    lambda folder: len([*folder.glob("shards/*/*.tar")]),
    lambda folder: files(folder / "shards"),
)
STAGES = (
    FIT,
    replace(FIT, args=(*FIT.args, *TWO, "--data.batch_size=8", "--data.num_workers=1"), ranks=2),
    PREDICT,
    replace(PREDICT, args=(*PREDICT.args, *TWO), ranks=2),
    Stage(
        "test",
        ("test", "--config", "test.yaml"),
        lambda folder: len([*folder.glob("run/reconstructions/*.safetensors")]),
        scores,
    ),
)


VALUES = 10_000_000  # of four bytes


def save(how: CheckpointIO, path: Path, step: int) -> None:
    state = {"weight": torch.full((VALUES,), float(step))}
    how.save_checkpoint({"state_dict": state, "global_step": step}, path)


def kill_while_saving(how: CheckpointIO, path: Path, kills: int) -> tuple[int, int]:
    """Kill processes that save: how many left a broken checkpoint under its name, and how many were within a save."""
    start = time.perf_counter()
    save(how, path, 0)
    duration = time.perf_counter() - start
    broken = interrupted = 0
    for number in range(kills):
        before = path.stat().st_mtime_ns
        child = os.fork()
        if child == 0:
            for step in range(1, 1000):
                save(how, path, step)
            os._exit(0)
        time.sleep(duration * (1 + 3 * number / kills))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        interrupted += any(path.parent.glob("*.partial")) or path.stat().st_mtime_ns == before
        try:
            found = read_checkpoint(path, "--ckpt_path")
            broken += not bool((found["state_dict"]["weight"] == found["global_step"]).all())
        except UserError:
            broken += 1
            save(how, path, 0)
    return broken, interrupted


def kill_saving(kills: int) -> Iterator[Figure]:
    """Both ways of saving."""
    for name, how in (("Lightning", TorchCheckpointIO()), ("this project", AtomicCheckpoints())):
        with tempfile.TemporaryDirectory(dir=".") as folder, tempfile.TemporaryDirectory(dir="/dev/shm") as temporary:
            tempfile.tempdir = temporary  # where Lightning's file waits for its name
            broken, interrupted = kill_while_saving(how, Path(folder).absolute() / "a.ckpt", kills)
            tempfile.tempdir = None
        note = f"{interrupted} in the middle of it" if interrupted else ""  # Lightning's leaves nothing to tell by
        yield Figure("saving 40 MB", f"kill -9, saved by {name}", kills, broken, note)


LIMIT_S = 60.0  # in which the other rank must have ended
LOSSES, SCORES = 1e-5, 1e-6  # how far one and two ranks may be apart


def compare_ranks(root: Path) -> Iterator[Figure]:
    """One rank with a batch of 2n and two with n: the same losses, scores and shards.

    77 samples are evaluated, which two ranks cannot share evenly, by batches of 10.
    """
    fit, fit_by_two, extract, extract_by_two, test = STAGES
    losses, others = (
        {name: max(values) for name, values in undisturbed(root, stage)[0]["rows"].items() if "loss" in name}
        for stage in (fit, fit_by_two)
    )
    yield compared("fit", "losses", losses, others, LOSSES)

    found, seen = [], []
    for ranks, more in ((1, ["--data.batch_size=10"]), (2, [*TWO, "--data.batch_size=5", "--data.num_workers=3"])):
        folder = test.place(root, f"parity-{ranks}")
        run([*test.args, *more, "--data.test.val=shards/val"], folder)
        rows = [row for rank in range(ranks) for row in lines(folder / SEEN.format(rank))]
        seen.append(sorted(key for *_, keys in rows for key in keys))
        found.append(joined(json.loads((folder / "run/metrics.json").read_text())))
    yield compared("test", "scores", found[0], found[1], SCORES)
    twice = len(seen[1]) - len(set(seen[1]))
    yield Figure("test", "samples, 1 and 2 processes", len(seen[0]), twice + (seen[0] != seen[1]), "each seen once")

    one, two = (undisturbed(root, stage)[0] for stage in (extract, extract_by_two))
    wrong = sum(one.get(name) != two.get(name) for name in one.keys() | two.keys())
    yield Figure("predict", "files, 1 and 2 processes", len(one), wrong, "the same to the byte")


def compared(stage: str, what: str, one: dict[str, float], other: dict[str, float], most: float) -> Figure:
    apart = [abs(value - other.get(name, math.inf)) for name, value in one.items()]
    wrong = sum(difference > most for difference in apart)
    return Figure(stage, f"{what}, 1 and 2 processes", len(apart), wrong, f"at most {max(apart):.0e} apart")


def end_one_of_two(root: Path, times: int, rng: random.Random) -> Iterator[Figure]:
    """Kill or ask one rank, in training and in a test, and see whether both end, in time and by their exit status."""
    _, fit, _, _, test = STAGES
    for stage, more in ((fit, "--trainer.max_steps=100000"), (test, "--data.batch_size=1")):
        for number, what in ((signal.SIGKILL, "kill -9 of"), (signal.SIGTERM, "SIGTERM to")):
            wrong, longest = 0, 0.0
            for _ in range(times):
                folder = stage.place(root, "ranks")
                seconds, status = end_one([*stage.args, *TWO, more], folder, number, rng)
                longest = max(longest, seconds)
                said = (folder / "output.txt").read_text()
                wrong += seconds > LIMIT_S or status in (0, None) or "Traceback" in said
            note = f"both ended, after {longest:.0f} s at most"
            yield Figure(stage.name, f"{what} one of 2 processes", times, wrong, note)


def end_one(args: list[str], folder: Path, number: int, rng: random.Random) -> tuple[float, int | None]:
    """Send a signal to one of two ranks at work; return after how many seconds none is left, and the exit status."""
    first, begun = start_as_users_do(args, folder), time.monotonic()
    while not all((folder / SEEN.format(rank)).is_file() for rank in range(2)):
        if time.monotonic() - begun > PATIENCE_S or ended(first) is not None:
            kill(first)
            raise RuntimeError(f"{args} has not begun:\n{(folder / 'output.txt').read_text()[-3000:]}")
        time.sleep(0.02)
    time.sleep(rng.uniform(0, 0.5))
    os.kill(rng.choice(ranks(first)), number)
    begun, status = time.monotonic(), None
    while (group(first) or status is None) and time.monotonic() - begun < LIMIT_S + 5:
        status = ended(first) if status is None else status
        time.sleep(0.02)
    seconds = time.monotonic() - begun
    kill(first)
    return seconds, status


def group(first: int) -> list[int]:
    """The processes of a group that are alive."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields: Any = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        if int(fields[2]) == first and fields[0] != "Z":
            found.append(int(path.parent.name))
    return sorted(found)


def ranks(first: int) -> list[int]:
    """The processes of a group, without loaders' workers and what starts them."""
    return [one for one in group(first) if b"multiprocessing" not in Path(f"/proc/{one}/cmdline").read_bytes()]
