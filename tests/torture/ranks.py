"""Two ranks against one, and ranks that are killed or asked to end."""

import json
import math
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tiny import joined
from torture.kills import stages
from torture.observers import ROWS, SEEN, lines
from torture.processes import PATIENCE_S, TWO, ended, kill, run, start_as_users_do
from torture.table import Figure

LIMIT_S = 60.0  # in which the other rank must have ended
LOSSES, SCORES = 1e-5, 1e-6  # how far one and two ranks may be apart


def compare_ranks(root: Path) -> Iterator[Figure]:
    """One rank with a batch of 2n and two with n: the same losses, scores and shards.

    77 samples are evaluated, which two ranks cannot share evenly, by batches of 10.
    """
    one, two, extract, extract_by_two, test = stages()
    curves = []
    for stage in (one, two):
        folder = stage.place(root, "parity")
        run(stage.args, folder)
        curves.append(curve(folder))
    losses = [abs(curves[0][key] - curves[1].get(key, math.inf)) for key in curves[0]]
    wrong = sum(loss > LOSSES for loss in losses)
    yield Figure("fit", "losses, 1 and 2 processes", len(losses), wrong, f"at most {max(losses):.0e} apart")

    found = []
    for ranks, more in ((1, ["--data.batch_size=10"]), (2, [*TWO, "--data.batch_size=5", "--data.num_workers=3"])):
        folder = test.place(root, f"parity-{ranks}")
        run([*test.args, *more, "--data.test.val=shards/val"], folder)
        seen = sorted(key for rank in range(ranks) for *_, keys in lines(folder / SEEN.format(rank)) for key in keys)
        found.append((joined(json.loads((folder / "run/metrics.json").read_text())), seen))
    (scores, seen), (others, same) = found
    apart = {name: abs(value - others[name]) for name, value in scores.items()}
    wrong = sum(difference > SCORES for difference in apart.values())
    yield Figure("test", "scores, 1 and 2 processes", len(apart), wrong, f"at most {max(apart.values()):.0e} apart")
    twice = len(same) - len(set(same))
    yield Figure("test", "samples, 1 and 2 processes", len(seen), twice + (same != seen), "each seen once")

    sets = []
    for stage in (extract, extract_by_two):
        folder = stage.place(root, "parity")
        run(stage.args, folder)
        sets.append(stage.left(folder))
    wrong = sum(sets[0].get(name) != sets[1].get(name) for name in sets[0].keys() | sets[1].keys())
    yield Figure("predict", "files, 1 and 2 processes", len(sets[0]), wrong, "the same to the byte")


def curve(folder: Path) -> dict[str, float]:
    """Each loss, by its name and step."""
    return {
        f"{name} {step}": value for step, row in lines(folder / ROWS) for name, value in row.items() if "loss" in name
    }


def end_one_of_two(root: Path, times: int, rng: random.Random) -> Iterator[Figure]:
    """Kill or ask one rank, in training and in a test, and see whether both end, in time and by their exit status."""
    _, fit, _, _, test = stages()
    for stage in (fit, test):
        more = "--data.batch_size=1" if stage is test else "--trainer.max_steps=100000"
        args = [*stage.args, *TWO, more]
        for number, what in ((signal.SIGKILL, "kill -9 of"), (signal.SIGTERM, "SIGTERM to")):
            wrong, longest = 0, 0.0
            for _ in range(times):
                folder = stage.place(root, "ranks")
                seconds, status = end_one(args, folder, number, rng)
                longest = max(longest, seconds)
                said = (folder / "output.txt").read_text()
                wrong += seconds > LIMIT_S or status in (0, None) or "Traceback" in said
            note = f"both ended, after {longest:.0f} s at most"
            yield Figure(stage.name, f"{what} one of 2 processes", times, wrong, note)


def end_one(args: list[str], folder: Path, number: int, rng: random.Random) -> tuple[float, int | None]:
    """Send a signal to one of two ranks at work; return after how many seconds none is left, and the exit status."""
    first, begun = start_as_users_do(args, folder), time.monotonic()
    while not all((folder / SEEN.format(rank)).is_file() for rank in range(2)):
        if time.monotonic() - begun > PATIENCE_S:
            kill(first)
            raise TimeoutError(f"{args} has not begun in {PATIENCE_S:.0f} seconds")
        if ended(first) is not None:
            raise RuntimeError(f"{args} has ended:\n{(folder / 'output.txt').read_text()[-3000:]}")
        time.sleep(0.02)
    time.sleep(rng.uniform(0, 0.5))
    os.kill(rng.choice(ranks(first)), number)
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
