"""The notebook runs from its first cell to its last, and shows what it promises."""

import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell

from conftest import ROOT


def test_notebook_runs_and_is_kept_without_outputs(
    inverter_folder: Path, digit_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process: a kernel of its own would import all libraries again."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    shutil.copytree(inverter_folder, "runs/viz/model")
    shutil.copytree(digit_shards, "runs/demo/shards")
    shutil.copytree(ROOT / "docs/digits", "docs/digits")
    Path("experiments").mkdir()
    monkeypatch.chdir("experiments")
    notebook: Any = nbformat.read(ROOT / "experiments/viz.ipynb", as_version=4)  # type: ignore[no-untyped-call]
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)
    shell = InteractiveShell()
    shown = []
    for cell in cells:
        done = shell.run_cell(cell.source)
        done.raise_error()
        shown.append(getattr(done.result, "_repr_png_", bytes)()[:4])
    assert shown.count(b"\x89PNG") == 5
