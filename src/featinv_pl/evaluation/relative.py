"""How groups of test sets, such as a corruption at all its severities, compare with the same images when clean."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from featinv_pl.evaluation.results import Name
from featinv_pl.metrics.estimates import Estimate
from featinv_pl.metrics.pairing import ImageSums, ratios

SCORES = {"cosine": False, "agreement@1": True, "agreement@5": True, "label@1": True}
"""By name, whether it is a share."""


class Relative:
    """`<score>_relative`: the score of a group divided by that of the clean test set, over the images of both.

    Args:
        clean: The name of the clean test set.
    """

    def __init__(self, clean: str) -> None:
        self.clean = clean
        self.groups: dict[str, ImageSums] = {}
        self.reference = ImageSums(len(SCORES))

    def add(self, source: str, groups: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> None:
        """Add a test set to its groups, and keep it if it is the clean one.

        Args:
            source: Its name.
            groups: Those that it belongs to.
            columns: The table of its images, of all ranks.
        """
        kept = [self.groups.setdefault(group, ImageSums(len(SCORES))) for group in groups]
        kept += [self.reference] if source == self.clean else []
        if kept and columns:
            missing = [np.nan] * len(columns["key"])
            values = np.array([columns.get(score, missing) for score in SCORES], dtype=np.float64).T
            for sums in kept:
                sums.add(columns["key"], values)

    def estimates(self, replicates: int) -> tuple[dict[Name, Estimate], list[str]]:
        """The scores of all groups, and notes on images that do not count.

        Args:
            replicates: See `SampleMetric`.
        """
        if self.groups and not self.reference.rows:
            return {}, [
                f"there are no scores relative to '{self.clean}': no test set of that name was scored. `clean` of "
                "PerSource names the clean one"
            ]
        found: dict[Name, Estimate] = {}
        notes = []
        for group, sums in self.groups.items():
            missing = len(sums.rows.keys() - self.reference.rows.keys())
            if missing:
                notes.append(
                    f"{group}: {missing} of {len(sums.rows)} images are not in '{self.clean}', and do not count in "
                    "scores relative to it"
                )
            if missing < len(sums.rows):
                quotients = ratios(sums, self.reference, list(SCORES.values()), replicates)
                found |= {
                    Name(group, f"{score}_relative"): quotient
                    for score, quotient in zip(SCORES, quotients, strict=True)
                }
        return found, notes
