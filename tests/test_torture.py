"""A short form of `make torture`: kills and a full disk.

Spoilt files are in test_hostile.py; ranks that end, in runtime/test_stopping.py.
"""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from torture.kills import STAGES, Stage, fill_disk, kill_stage, prepare

PREDICT = STAGES[2]
FIT = replace(STAGES[0], args=(*STAGES[0].args, "--data.num_workers=0"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("torture"))


@pytest.mark.parametrize("stage", [PREDICT, FIT], ids=["predict", "fit"])
def test_a_kill_loses_nothing(stage: Stage, root: Path) -> None:
    figure = kill_stage(root, stage, 1, random.Random(0))
    assert (figure.times, figure.wrong) == (1, 0), figure


def test_a_full_disk_loses_nothing(root: Path) -> None:
    assert fill_disk(root, PREDICT, 1, random.Random(0)).wrong == 0
