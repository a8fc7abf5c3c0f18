"""A short version of `make torture`; what spoilt files do is in test_hostile.py."""

import random
from pathlib import Path

import pytest
import torch

from torture.disk import fill_disk
from torture.kills import kill_stage, prepare, stages
from torture.ranks import compare_ranks, end_one_of_two
from torture.table import Figure

STAGES = stages()
NAMES = [f"{stage.name}-{stage.ranks}" for stage in STAGES]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return prepare(tmp_path_factory.mktemp("torture"))


def check(figure: Figure, times: int) -> None:
    assert figure.times >= times
    assert figure.wrong == 0, str(figure)


@pytest.mark.parametrize("number", range(len(STAGES)), ids=NAMES)
def test_a_kill_loses_nothing(number: int, root: Path) -> None:
    stage = STAGES[number]
    check(kill_stage(root, stage, 2 if stage.ranks == 1 else 1, random.Random(number)), 1)


def test_one_rank_and_two_come_to_the_same(root: Path) -> None:
    for figure in compare_ranks(root):
        check(figure, 5)


def test_ranks_end_together(root: Path) -> None:
    check(next(end_one_of_two(root, 1, random.Random(0))), 1)


@pytest.mark.parametrize("number", [number for number, stage in enumerate(STAGES) if stage.ranks == 1])
def test_a_full_disk_loses_nothing(number: int, root: Path) -> None:
    check(fill_disk(root, STAGES[number], 1, random.Random(number)), 1)
