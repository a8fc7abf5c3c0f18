"""A short version of `make torture-data`."""

import random
from pathlib import Path

import pytest
from torture_data import Figure, make_networks, torture_extraction, torture_shards, torture_streaming


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("torture")
    (root / "networks").mkdir()
    make_networks(root / "networks")
    return root


def test_nothing_is_lost_twice_or_unnoticed(root: Path) -> None:
    rng = random.Random(0)
    figures: list[Figure] = [
        *torture_extraction(root, 1, rng),
        *torture_streaming(root, 1, rng),
        *torture_shards(root, 27, rng),
    ]
    assert [figure.done >= 1 for figure in figures] == [True] * len(figures)
    assert [str(figure) for figure in figures if figure.wrong] == []
