"""The first n per class, whatever the order in which a file system lists them."""

import random
from pathlib import Path

import pytest

from featinv_pl.data.selection import first_per_class
from featinv_pl.errors import UserError

FILES = [(Path(f"{label}/{name}.png"), label) for label in (0, 2) for name in "abcd"] + [(Path("1/a.png"), 1)]


def test_takes_the_first_of_each_class() -> None:
    shuffled = random.Random(0).sample(FILES, len(FILES))
    chosen = first_per_class(shuffled, 2)
    assert [path.as_posix() for path, _ in chosen] == ["0/a.png", "0/b.png", "1/a.png", "2/a.png", "2/b.png"]
    assert [label for _, label in chosen] == [0, 0, 1, 2, 2]


def test_sorts_by_file_name_alone() -> None:
    files = [(Path("b/1.png"), 0), (Path("a/2.png"), 0)]
    assert first_per_class(files, 1) == [(Path("b/1.png"), 0)]


def test_none_per_class_is_refused() -> None:
    with pytest.raises(UserError, match="At least 1"):
        first_per_class(FILES, 0)
