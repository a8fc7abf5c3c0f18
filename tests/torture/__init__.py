"""`make torture`: the public command under kills, full disks, lost ranks and spoilt files."""

from dataclasses import dataclass

HEAD = "| stage | what was done | times | wrong | beside |\n|---|---|--:|--:|---|"


@dataclass
class Figure:
    """A line of the table; wrong is what was lost, repeated or not noticed."""

    stage: str
    done: str
    times: int
    wrong: int
    note: str = ""

    def __str__(self) -> str:
        return f"| {self.stage} | {self.done} | {self.times} | {self.wrong} | {self.note} |"
