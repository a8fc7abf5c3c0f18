"""A short form of `make torture`: kills, ranks that end, full disks.

Spoilt files are in test_hostile.py; that one rank and several come to the same is tested where they differ.
"""

import random
from pathlib import Path

import pytest
import torch

from torture.kills import fill_disk, kill_stage, prepare, stages
from torture.ranks import end_one_of_two
from torture.table import Figure

STAGES = {f"{stage.name}-{stage.ranks}": stage for stage in stages()}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return prepare(tmp_path_factory.mktemp("torture"))


def check(figure: Figure, times: int) -> None:
    assert figure.times >= times
    assert figure.wrong == 0, str(figure)


@pytest.mark.parametrize("name", ["predict-2", "fit-1", "test-1"])
def test_a_kill_loses_nothing(name: str, root: Path) -> None:
    check(kill_stage(root, STAGES[name], 2 if STAGES[name].ranks == 1 else 1, random.Random(name)), 1)


def test_ranks_end_together(root: Path) -> None:
    check(next(end_one_of_two(root, 1, random.Random(0))), 1)


@pytest.mark.parametrize("name", ["predict-1", "fit-1"])
def test_a_full_disk_loses_nothing(name: str, root: Path) -> None:
    check(fill_disk(root, STAGES[name], 1, random.Random(name)), 1)
