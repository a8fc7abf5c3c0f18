"""What is said about the package is complete; `make dist` and `make matrix` build it and try it."""

import re
import tomllib
from fnmatch import fnmatch

import pytest
import yaml

from installs import EXTRAS, PROJECT, PYTHONS, SOURCE, matrix

PROJECT_TABLE = tomllib.loads((PROJECT / "pyproject.toml").read_text())
SAID = PROJECT_TABLE["project"]


def test_metadata_is_that_of_the_citation() -> None:
    citation = yaml.safe_load((PROJECT / "CITATION.cff").read_text())
    assert [author["name"] for author in SAID["authors"]] == [author["name"] for author in citation["authors"]]
    assert SAID["license"] == citation["license"]
    assert citation["preferred-citation"]["url"] in SAID["urls"].values()
    assert len(SAID["keywords"]) >= 5
    pythons = {one.rpartition(" ")[2] for one in SAID["classifiers"] if re.search(r":: 3\.\d+$", one)}
    assert pythons == {*PYTHONS}


def test_every_file_beside_the_code_is_shipped() -> None:
    package = SOURCE / "featinv_pl"
    files = {path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file()}
    others = {name for name in files if not name.endswith((".py", ".pyc"))}
    patterns = PROJECT_TABLE["tool"]["setuptools"]["package-data"]["featinv_pl"]
    assert others
    assert {name for name in others if not any(fnmatch(name, pattern) for pattern in patterns)} == set()
    assert [pattern for pattern in patterns if not any(fnmatch(name, pattern) for name in others)] == []


def test_every_bound_says_why() -> None:
    """In `pyproject.toml`, on the line of the bound."""
    text = (PROJECT / "pyproject.toml").read_text()
    for bound in SAID["dependencies"]:
        assert re.search(r"[>~=]=", bound), bound
        assert re.search(re.escape(f'"{bound}",') + r"\s+# \w", text), bound


@pytest.mark.parametrize("page", ["README.md", "docs/install.md", "docs/viz.md", "Dockerfile"])
def test_extras_that_are_named_exist(page: str) -> None:
    text = (PROJECT / page).read_text()
    named = {extra for given in re.findall(r"featinv-pl\[([\w,]+)\]", text) for extra in given.split(",")}
    named |= {extra for given in re.findall(r"EXTRAS=([\w,]+)", text) for extra in given.split(",")}
    assert named
    assert named <= SAID["optional-dependencies"].keys()
    assert {*EXTRAS} <= SAID["optional-dependencies"].keys()


def test_the_image_runs_as_a_user_and_copies_what_is_there() -> None:
    lines = [line.split("#")[0].split() for line in (PROJECT / "Dockerfile").read_text().splitlines()]
    assert [line[1] for line in lines if line[:1] == ["USER"]] == ["featinv"]
    assert {line[1].split(":")[1].removesuffix("-slim") for line in lines if line[:1] == ["FROM"]} <= {*PYTHONS}
    copied = {name for line in lines if line[:1] == ["COPY"] and "--from=build" not in line for name in line[1:-1]}
    ignored = (PROJECT / ".dockerignore").read_text().splitlines()
    assert all((PROJECT / name).exists() and f"!{name}" in ignored for name in copied)


def test_a_cell_that_fails_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an index that is out of reach, as of a bound that is wrong."""
    monkeypatch.setenv("UV_OFFLINE", "1")
    monkeypatch.setenv("UV_NO_CACHE", "1")
    [row] = matrix(["3.12"], ["lowest-direct"], resolve_only=True)
    assert row.startswith("| 3.12 | oldest |  | FAILED: ")
    assert "No solution found" in row
