"""The arms of an evaluation: all that is scored by the same metrics on the same images."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from featinv_pl.errors import UserError

NAME = re.compile(r"[A-Za-z0-9_-]+")  # of an arm: it is part of a score's name, and of a file's


@dataclass(frozen=True)
class Arm:
    """One arm.

    Attributes:
        label: What tables and pictures call it.
        meaning: What it is, in the words of the report.
    """

    label: str
    meaning: str


INVERSION, CEILING, FLOOR, ORIGINAL = "inversion", "ceiling", "floor", "original"
REGRESSION, NEIGHBOUR = "regression", "neighbour"

ARMS = {
    INVERSION: Arm("reconstruction", "what the inverter reconstructs from the feature map"),
    CEILING: Arm("autoencoder", "the original through the prior's autoencoder alone"),
    REGRESSION: Arm("regression", "the image of the latents that a small network expects of the map"),
    NEIGHBOUR: Arm("neighbour", "the training image with the most similar map"),
    FLOOR: Arm("floor", "another image of the test set"),
    ORIGINAL: Arm("original", "the original itself"),
}
"""Those that every evaluation can have, in the order of tables. Further samplers follow under their own names."""


def ordered(names: Iterable[str]) -> list[str]:
    """Names of arms in the order of tables: first those of `ARMS`, then further samplers."""
    names = list(names)
    return [name for name in ARMS if name in names] + [name for name in names if name not in ARMS]


def label(arm: str) -> str:
    """What tables and pictures call an arm."""
    return ARMS[arm].label if arm in ARMS else arm


def check_names(names: Iterable[str]) -> None:
    """Refuse names of further samplers that cannot be part of a score's name, or that an arm has already."""
    taken = {*ARMS, *(arm.label for arm in ARMS.values()), "own"}  # which a study calls the inverter's sampler
    for name in names:
        if not NAME.fullmatch(name):
            raise UserError(
                f"--model.arms: '{name}' cannot be part of a score's name. Use letters, digits, - and _ alone."
            )
        if name in taken:
            raise UserError(f"--model.arms: '{name}' is what another arm is called. Choose another name.")
