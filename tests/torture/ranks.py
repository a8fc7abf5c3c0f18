"""Two ranks against one, ranks that die, and ranks that are asked to end."""

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

from torture.kills import stages, workplace
from torture.observers import ROWS, SEEN, lines
from torture.processes import TWO, ended, kill, run, start
from torture.table import Figure

LIMIT_S = 60.0  # in which the other ranks must have ended


def compare_ranks(root: Path) -> list[Figure]:
    """One rank with a batch of 2n and two with n: the same losses, and the same scores of 7 samples a batch."""
    one, two, _, test = stages()
    first, second = workplace(root, one, "parity"), workplace(root, two, "parity")
    run(one.args, first)
    run(two.args, second)
    curves = [curve(folder) for folder in (first, second)]
    losses = [abs(curves[0][key] - curves[1][key]) for key in curves[0]]
    unlike = curves[0].keys() != curves[1].keys() or max(losses) > 1e-5
    figures = [
        Figure(
            "fit", "losses of 1 and of 2 processes", len(losses), int(unlike), note=f"at most {max(losses):.0e} apart"
        )
    ]

    found = []
    for ranks, more in ((1, ["--data.batch_size=10"]), (2, [*TWO, "--data.batch_size=5"])):
        folder = workplace(root, test, f"parity-{ranks}")
        run([*test.args, *more, "--data.test.val=shards/val"], folder)
        keys = [key for rank in range(ranks) for *_, keys in lines(folder / SEEN.format(rank)) for key in keys]
        found.append((json.loads((folder / "run/metrics.json").read_text()), sorted(keys)))
    (scores, keys), (others, same) = found
    apart = max(abs(value - others["scores"][name]) for name, value in scores["scores"].items())
    wrong = apart > 1e-6 or keys != same or scores["samples"] != others["samples"]
    figures.append(
        Figure(
            "test",
            "scores of 1 and of 2 processes",
            len(scores["scores"]),
            int(wrong),
            note=f"at most {apart:.0e} apart",
        )
    )
    return figures


def curve(folder: Path) -> dict[str, float]:
    """Each loss, by its name and step."""
    return {
        f"{name} {step}": value for step, row in lines(folder / ROWS) for name, value in row.items() if "loss" in name
    }


def end_one_of_two(root: Path, times: int, rng: random.Random) -> list[Figure]:
    """Kill or ask one rank, in training and in a test, and see whether both end, in time and by their exit status."""
    figures = []
    _, fit, _, test = stages()
    for stage in (fit, test):
        args = [*stage.args, *TWO] if stage is test else [*stage.args, "--trainer.max_steps=100000"]
        for number, what in ((signal.SIGKILL, "kill -9 of"), (signal.SIGTERM, "SIGTERM to")):
            wrong, longest = 0, 0.0
            for _ in range(times):
                folder = workplace(root, stage, "ranks")
                seconds, status = end_one(args, folder, number, rng)
                longest = max(longest, seconds)
                wrong += seconds > LIMIT_S or status in (0, None)
            note = f"all ended, the last after {longest:.0f} s"
            figures.append(Figure(stage.name, f"{what} one of 2 processes", times, wrong, note=note))
    return figures


def end_one(args: list[str], folder: Path, number: int, rng: random.Random) -> tuple[float, int | None]:
    """Send a signal to one of two ranks at work; return after how many seconds none is left, and the exit status."""
    first = start(args, folder)
    while not all((folder / SEEN.format(rank)).is_file() for rank in range(2)):
        if ended(first) is not None:
            raise RuntimeError(f"{args} has ended:\n{(folder / 'output.txt').read_text()[-3000:]}")
        time.sleep(0.02)
    time.sleep(rng.uniform(0, 0.5))
    ranks = group(first)
    os.kill(rng.choice(ranks), number)
    begun, status = time.monotonic(), None
    while time.monotonic() - begun < LIMIT_S + 5:
        status = ended(first) if status is None else status
        if status is not None and not group(first):
            break
        time.sleep(0.02)
    seconds = time.monotonic() - begun
    kill(first)
    return seconds, status


def group(first: int) -> list[int]:
    """The processes of a group that are alive, without those that only read data."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields: Any = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        if int(fields[2]) == first and fields[0] != "Z":
            found.append(int(path.parent.name))
    return sorted(found)
