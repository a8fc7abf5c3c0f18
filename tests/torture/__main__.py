"""All of it, as one table."""

import argparse
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from torture import HEAD, Figure
from torture.hostile import damage_files
from torture.kills import STAGES, compare_ranks, end_one_of_two, fill_disk, kill_saving, kill_stage, prepare


def torture(root: Path, kills: int, mutations: int, rng: random.Random) -> Iterator[Figure]:
    """One theme after the other."""
    prepare(root)
    some = max(kills // 4, 1)
    yield from (kill_stage(root, stage, kills, rng) for stage in STAGES)
    yield from kill_saving(2 * kills)
    yield from compare_ranks(root)
    yield from end_one_of_two(root, some, rng)
    yield from (fill_disk(root, stage, some, rng) for stage in STAGES if stage.ranks == 1)
    yield from damage_files(root / "hostile", mutations)


def main() -> None:
    parser = argparse.ArgumentParser("torture", description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="of each stage")
    parser.add_argument("--mutations", type=int, default=50, help="at random, of each kind of file")
    parser.add_argument("--short", action="store_true", help="once of everything")
    options = parser.parse_args()
    if options.short:
        options.kills = options.mutations = 1
    torch.set_num_threads(1)
    os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    begun, wrong = time.monotonic(), 0
    print(HEAD, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for figure in torture(Path(folder), options.kills, options.mutations, random.Random(0)):
            print(figure, flush=True)
            wrong += figure.wrong if "Lightning" not in figure.done else 0
    print(f"\n{(time.monotonic() - begun) / 60:.0f} minutes, torch {torch.__version__}, {platform.machine()}")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
