"""The prose of README and docs: proselint's checks, and the project's own words.

make docs

The glossary in docs/architecture.md decides which word is used for what.
"""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from proselint.checks import __register__ as theirs
from proselint.config import DEFAULT, Config
from proselint.registry import CheckRegistry
from proselint.registry.checks import Check, CheckResult
from proselint.tools import LintFile

PROJECT = Path(__file__).resolve().parents[1]
PAGES = [PROJECT / name for name in ("README.md", "CONTRIBUTING.md", "experiments/imagenet/README.md")]
PAGES += sorted((PROJECT / "docs").glob("*.md"))

GOOD = "longer|more|less|higher|lower|better|worse|other|matter|such"
# What is said otherwise here: a pattern, in which a space stands for any white space, and what to write.
SAY = {
    r"arms?": "sampler or baseline",
    r"eyes?": "classifier, or held-out classifier",
    r"anybody|whoever": "anyone, or those who",
    r"whole or not there|whole files?|whole maps?": "complete",
    r"go(?:es)? on(?: again)?": "continue, or resume",
    r"lay(?:s|ing)? (?:it|them|a file|an? \w+) over|lies? over|laid beneath": "override",
    r"numbers that are none": "NaN and Inf",
    rf"(?<!there\s)(?:is|are|was|were) no(?! (?:{GOOD}))": "is not a",
    r"but for (?!the fact)": "except for",
    r"has got|have got": "has",
    r"in the way of": "stop",
    r"make room or get leave": "free space or fix permissions",
    r"wants to call": "would execute",
    r"so too": "the same",
    r"for ever": "forever",
    r"of one's own": "of your own",
    r"trusted by name": "on the allow-list",
    r"hostile input": "hostile files",
}
# What a page must explain before it uses it: it is set in italics or bold, or linked, where it is first used.
EXPLAINED = ("judge", "calibrated", "gap closed|close[sd]? .{0,20}gap", "floor", "ceiling", "drawings?", "neighbour")
UNUSED = (
    "typography.symbols",  # straight quotes, and the spaces that stand for code
    "typography.diacritical_marks",  # to resume is no résumé
    "dates_times.dates",  # of "00's", in a range of names
)
CODE = (
    r"```.*?```|~~~.*?~~~",
    r"(?m)^    [^\n]*$",  # indented
    r"(?s)<!--.*?-->",
    r"`[^`]+`",
    r"\]\([^)]*\)",  # addresses
    r"<[^>]+>",
)


def text_of(page: str) -> str:
    """The page with its code replaced by spaces, so that places stay as they are."""
    for pattern in CODE:
        page = re.sub(pattern, lambda found: re.sub(r"[^\n]", " ", found[0]), page, flags=re.DOTALL)
    return page


def _of_words(pattern: str) -> re.Pattern[str]:
    spaced = pattern.replace(" ", r"\s+")
    return re.compile(rf"\b(?:{spaced})\b", re.IGNORECASE)


def _dialect(text: str, check: Check) -> Iterator[CheckResult]:
    for pattern, better in SAY.items():
        for found in _of_words(pattern).finditer(text):
            yield CheckResult(check.path, f"'{' '.join(found[0].split())}': say {better}.", found.span(), better)


def _unexplained(text: str, check: Check) -> Iterator[CheckResult]:
    prose = re.sub(r"(?m)^(?:\||#|!\[).*$", lambda found: " " * len(found[0]), text)
    for pattern in EXPLAINED:
        found = _of_words(pattern).search(prose)
        if not found:
            continue
        before = prose[max(0, found.start() - 60) : found.start()].rpartition("\n\n")[2]
        if not re.search(r"(\*|\[)(\S[^*\]]*)?$", before):
            yield CheckResult(check.path, f"'{found[0]}' is not explained where it is first used.", found.span(), None)


OURS = (Check(_dialect, path="ours.words"), Check(_unexplained, path="ours.explained"))


def faults(page: Path) -> list[str]:
    """What is to mend in a page, a line each."""
    registry = CheckRegistry()
    if not registry.checks:
        registry.register_many((*theirs, *OURS))
    checks = dict.fromkeys(UNUSED, False) | dict(DEFAULT["checks"]) | {"ours": True}
    found = LintFile(page, text_of(page.read_text())).lint(Config(max_errors=1000, checks=checks))
    name = os.path.relpath(page, PROJECT)
    return [f"{name}:{one.pos[0] - 1}: {one.check_result.message} ({one.check_result.check_path})" for one in found]


if __name__ == "__main__":
    lines = [line for page in PAGES for line in faults(page)]
    print(*lines, sep="\n") if lines else None
    sys.exit(bool(lines))
