"""The methods whose reconstructions of the same images are scored: samplers and baselines."""

import re
from collections.abc import Iterable

from featinv_pl.errors import UserError

INVERSION, CEILING, REGRESSION = "inversion", "ceiling", "regression"
NEIGHBOUR, FLOOR, ORIGINAL = "neighbour", "floor", "original"
LABELS = {
    INVERSION: "reconstruction",  # by the inverter's own sampler
    CEILING: "autoencoder",  # the original through the prior's autoencoder alone
    REGRESSION: "regression",  # the decoded latents that a small network predicts from the feature map
    NEIGHBOUR: "neighbour",  # the training image with the most similar feature map
    FLOOR: "floor",  # another image of the test set
    ORIGINAL: "original",
}
"""Labels in tables and pictures, in the order of tables. Further samplers follow under their own names."""


def label(method: str) -> str:
    """The label of a method in tables and pictures."""
    return LABELS.get(method, method)


def check_names(samplers: Iterable[str]) -> None:
    """Refuse names of further samplers that cannot be part of a score's name, or that another method has."""
    taken = {*LABELS, *LABELS.values(), "own"}  # the study's word for the inverter's sampler
    for name in samplers:
        if name in taken or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            why = "is the name of another method" if name in taken else "cannot be part of a score's name"
            raise UserError(f"`samplers`: '{name}' {why}. Use other letters, digits, - and _.")
