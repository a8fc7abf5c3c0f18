"""Which images of a data set are evaluated."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from featinv_pl.errors import UserError


def first_per_class(files: Iterable[tuple[Path, int]], limit: int) -> list[tuple[Path, int]]:
    """The first images of each class after sorting by name: a selection that everybody can repeat.

    Of ImageNet's validation set, 10 per class give the usual 10,000 images.

    Args:
        files: (path, class) in any order.
        limit: Images per class; classes with fewer keep all they have.

    Returns:
        The selection, sorted by class and file name.
    """
    if limit < 1:
        raise UserError(f"At least 1 image per class must be chosen, and {limit} was given.")
    taken: Counter[int] = Counter()
    chosen = []
    for path, label in sorted(files, key=lambda file: (file[1], file[0].name, file[0])):
        taken[label] += 1
        if taken[label] <= limit:
            chosen.append((path, label))
    return chosen
