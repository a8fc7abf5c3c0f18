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
from torture import Figure
from torture.kills import STAGES, undisturbed
from torture.processes import PATIENCE_S, SEEN, TWO, ended, kill, lines, run, start_as_users_do

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
        seen.append(
            sorted(key for rank in range(ranks) for *_, keys in lines(folder / SEEN.format(rank)) for key in keys)
        )
        found.append(joined(json.loads((folder / "run/metrics.json").read_text())))
    yield compared("test", "scores", *found, SCORES)
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
