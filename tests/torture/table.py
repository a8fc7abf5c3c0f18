"""The table of figures."""

from dataclasses import dataclass

HEAD = "| stage | what was done | times | wrong | beside |\n|---|---|--:|--:|---|"


@dataclass
class Figure:
    """One line: what was done to which stage how often, and how often something was lost, repeated or not noticed."""

    stage: str
    done: str
    times: int
    wrong: int
    note: str = ""

    def __str__(self) -> str:
        return f"| {self.stage} | {self.done} | {self.times} | {self.wrong} | {self.note} |"
