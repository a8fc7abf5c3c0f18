"""A short version of `make smoke`; and nothing that is shipped is left out of the long one."""

import re
from pathlib import Path

from smoke.__main__ import attempt, prepare
from smoke.files import SHIPPED, TAKEN_ALONG, bases, jobs
from smoke.targets import PROJECT, TARGETS

OTHERS = {"help", "install", "smoke", "test", "coverage", "lint", "types", "format", "check", "clean"}


def test_every_file_and_every_target_is_run() -> None:
    shipped = {path.relative_to(SHIPPED).as_posix() for path in SHIPPED.rglob("*.yaml")}
    assert {*jobs(), *bases(), *TAKEN_ALONG} == shipped
    found = set(re.findall(r"^([a-z0-9-]+):.*?## ", (PROJECT / "Makefile").read_text(), re.MULTILINE))
    assert found - OTHERS == {*TARGETS, "demo", "study", "study-cifar10"}


def test_a_file_is_run(tmp_path: Path) -> None:
    """Others, from pretraining to sweeps, have tests of their own."""
    prepare(tmp_path, ["resnet50"])
    name = "imagenet/extract/resnet50.yaml"
    row = attempt(name, jobs()[name])
    assert row.result == "good", row
