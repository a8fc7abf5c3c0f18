"""Run the notebooks and keep what they show: `make notebooks`.

One whose runs are missing keeps its outputs. `--short` is for a try: it runs those that can be, and writes nothing.
"""

import base64
import io
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

NOTEBOOKS = {"viz": "make demo", "photos": "make study-photos"}  # and what makes the runs that they need
COLOURS = 256  # of a picture, for a page that loads at once
LARGEST = 2**20  # bytes of a notebook


def small(picture: str) -> str:
    """A PNG in base64, with fewer colours."""
    quantised = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB").quantize(COLOURS)
    buffer = io.BytesIO()
    quantised.save(buffer, format="png", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def tidied(notebook: Any) -> Any:
    """Without times, what goes to stderr and what names objects; pictures are made small."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
        for data in (one.data for one in cell.outputs if "data" in one):
            if "image/png" in data:
                data.pop("text/plain", None)
                data["image/png"] = small(data["image/png"])
    return notebook


def main() -> None:
    for name, maker in NOTEBOOKS.items():
        path = Path(f"experiments/{name}.ipynb")
        notebook: Any = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
        if missing := [need for need in notebook.metadata.needs if not Path(need).exists()]:
            print(f"{path} keeps its outputs: there is no {missing[0]}, which `{maker}` makes.")
            continue
        print(f"{path} ...", flush=True)
        NotebookClient(notebook, timeout=None, resources={"metadata": {"path": "."}}).execute()
        text: str = nbformat.writes(tidied(notebook))  # type: ignore[no-untyped-call]
        assert len(text) < LARGEST, f"{path} would have {len(text)} bytes. Show fewer pictures."
        if "--short" not in sys.argv:
            path.write_text(f"{text}\n")
        print(f"{path}: {len(text) / 1024:.0f} KiB{' (not written)' if '--short' in sys.argv else ''}")


if __name__ == "__main__":
    main()
