"""Disks that are full at any moment: a file can grow only so large, and the rest of it is refused."""

import random
import re
from pathlib import Path

from torture.kills import Stage, files, unlike, workplace
from torture.processes import run
from torture.table import Figure

ONE_LINE = r"featinv-pl: error: .*'.*(File too large|No space left)"  # and the name of the file
LEAST = 20_000  # bytes: what commands print and note goes to files too


def fill_disk(root: Path, stage: Stage, times: int, rng: random.Random) -> Figure:
    """Run a command for which there is no room, then the same command with room; compare with one that always had."""
    whole = workplace(root, stage, "whole")
    run(stage.args, whole)
    expected, largest = stage.left(whole), max(map(len, files(whole).values()))
    lost = unnoticed = 0
    for number in range(times):
        folder = workplace(root, stage, f"full-{number}")
        run(stage.args, folder, expected=1, largest=rng.randrange(LEAST, largest))
        said = (folder / "output.txt").read_text()
        unnoticed += "Traceback" in said or not re.search(ONE_LINE, said)
        run(stage.args, folder)
        lost += unlike(stage.left(folder), expected) is not None
    return Figure(stage.name, "disk full", times, lost, unnoticed, "one line each, and the same command goes on")
