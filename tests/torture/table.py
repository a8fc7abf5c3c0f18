"""The table of figures."""

from dataclasses import dataclass

HEAD = "| stage | what was done | times | lost | not noticed | beside |\n|---|---|--:|--:|--:|---|"


@dataclass
class Figure:
    """One line: what was done to which stage how often, and what went wrong.

    Attributes:
        stage: Which.
        done: What was done.
        times: How often.
        lost: After how many of these something was lost, repeated or different; None where nothing can be.
        unnoticed: How many of these were not noticed; None where it goes without saying.
        note: What else to know.
    """

    stage: str
    done: str
    times: int
    lost: int | None = None
    unnoticed: int | None = None
    note: str = ""

    @property
    def wrong(self) -> int:
        """How often something went wrong."""
        return (self.lost or 0) + (self.unnoticed or 0)

    def __str__(self) -> str:
        counts = ["" if count is None else str(count) for count in (self.times, self.lost, self.unnoticed)]
        return f"| {' | '.join([self.stage, self.done, *counts, self.note])} |"
