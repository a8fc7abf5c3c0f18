"""Every page in a real browser of a phone's width: nothing missing, nothing fetched, nothing to scroll sideways."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from conftest import ROOT, copy_of
from featinv_pl.__main__ import main
from featinv_pl.completion import collected
from featinv_pl.pages.page import Report, Section, Tile
from notebooks import LARGEST

ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
PAGES = ("examples", "steering", "steered", "interpolation", "interpolated", "composition", "comparison", "audit")
PHONE: Any = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def outputs(tmp_path_factory: pytest.TempPathFactory, inverter_folder: Path, digit_shards: Path) -> Path:
    """A folder for each command, named as its page."""
    folder = tmp_path_factory.mktemp("outputs")
    model, train = ["--model", str(inverter_folder)], str(digit_shards / "train")
    steering = ["--concept", "3-8", "--strengths", "-2:2:9", "--class", "3", "--num_samples", "2"]
    over = ["--over", train, "--num_images", "4"]
    with contextlib.chdir(folder):
        four, seven = copy_of("4", folder), copy_of("7", folder)
        two = [str(four), str(seven)]
        Image.open(four).resize((900, 700)).save("big.png")
        for name, command in {
            "examples": ["concepts", train, "--method", "difference", "--between", "4", "9", "--between", "3", "8"],
            "steering": ["steer", *model, two[0], "--concepts", "examples", *steering],
            "interpolation": ["interpolate", *model, *two, "--steps", "4", "--mode", "slerp", "--real", train],
            "steered": ["steer", *model, *over, "--concepts", "examples", "--strengths", "1"],
            "interpolated": ["interpolate", *model, *over, "--steps", "3", "--real", train],
            "composition": ["compose", *model, *two, "--box", "0,0,16,32", "--num_samples", "2"],
            "comparison": ["compare", *two, "big.png", "--models", model[1], model[1]],
            "audit": ["audit", *model, *two, "--num_samples", "4", "--methods", "inverter", "refined"],
        }.items():
            with Path(f"{name}.txt").open("w") as printed, contextlib.redirect_stdout(printed):
                main([*command, "--out", name])
    return folder


@pytest.mark.parametrize("name", PAGES)
def test_a_command_ends_with_its_results_and_what_follows(name: str, outputs: Path) -> None:
    *_, results, follows = (outputs / f"{name}.txt").read_text().splitlines()
    assert results == f"Results: {name}/{name}.html (open it in a browser; .png and .json beside it)"
    said, program, command, *args = follows.split()
    assert (said, program) == ("Next:", "featinv-pl")
    assert {one for one in args if one.startswith("--")} <= {*collected(command)._option_string_actions}
    assert not {one for one in args if "/" in one and not (outputs / one).exists()}


def test_facts_are_of_what_was_asked_for(outputs: Path) -> None:
    def facts(name: str) -> Any:
        assert {path.name for path in (outputs / name).iterdir()} >= {f"{name}.html", f"{name}.png", f"{name}.json"}
        return json.loads((outputs / name / f"{name}.json").read_text())

    assert list(facts("examples")) == ["4-9", "3-8"]
    steering = facts("steering")
    assert [step["strength"] for step in steering["steps"]] == [-2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2]
    assert steering["concept"] == "3-8"
    page = (outputs / "steering/steering.html").read_text()
    assert page.count("data:image/png") == 1 + 9 * (2 + 2)  # both samples, one of each control
    assert page.count("data:image/svg+xml") == 7  # curves
    assert "http" not in page
    interpolation = facts("interpolation")
    assert interpolation["mode"] == "slerp"
    assert [type(step["flagged"]) for step in interpolation["steps"]] == [bool] * 4
    composition = facts("composition")
    assert (composition["box"], len(composition["images"])) == ([0, 0, 16, 32], 2)
    comparison = facts("comparison")
    assert list(comparison) == ["digit-4", "digit-7", "big"]
    assert list(comparison["big"]) == ["0-model", "1-model"]
    audit = facts("audit")
    assert (list(audit["acceptance"]), list(audit["images"])) == (["inverter", "refined"], ["digit-4", "digit-7"])
    assert (outputs / "comparison/comparison.html").read_text().count("→") == 2 * 6  # in captions and alternatives


@pytest.mark.parametrize("name", PAGES)
def test_page_on_a_phone(name: str, outputs: Path, browser: Browser) -> None:
    problems: list[str] = []
    page = browser.new_page(viewport=PHONE)
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: problems.append(request.url) if request.url.startswith("http") else None)
    page.goto((outputs / name / f"{name}.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    widths = page.evaluate("[...document.images].map(image => [image.complete, image.naturalWidth, image.width])")
    assert len(widths) >= 4
    assert all(complete and natural > 0 and shown >= 80 for complete, natural, shown in widths)
    alternatives = page.evaluate("[...document.images].map(image => image.alt)")
    assert all(alternatives)
    assert page.locator("h1").count() == 1
    assert {"input", "seed", "made by", "made on"} < {*page.locator("dt").all_inner_texts()}
    command = page.locator("dt:text-is('made by') + dd").inner_text()
    assert command.startswith("featinv-pl ")
    assert command.endswith(f"--out {name}")
    first = page.locator("main img").first
    first.click()
    shown = page.locator("dialog img")
    assert shown.get_attribute("src") == first.get_attribute("src")
    assert shown.bounding_box()["width"] > 300  # type: ignore[index]
    page.keyboard.press("Escape")
    assert not shown.is_visible()
    page.emulate_media(color_scheme="dark", media="screen")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 27)"
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.close()
    assert not problems
    with Image.open(outputs / name / f"{name}.png") as figure:
        assert min(figure.size) > 300


class Broken(Report):
    """A report whose figure cannot be drawn, if it has no rows."""

    name = "broken"
    title, lead = "<b>", "broken"
    rows: ClassVar = [[Tile(Image.new("RGB", (4, 4)), "<script>bad")]]

    def sections(self) -> list[Section]:
        return [Section("one", rows=self.rows)]

    def facts(self) -> dict[str, Any]:
        return {}


def test_text_is_not_markup_and_nothing_is_written_of_a_report_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    Broken().save(Path("out"))
    page = Path("out/broken.html").read_text()
    assert "&lt;script&gt;" in page
    assert "<script>bad" not in page
    assert "&lt;b&gt;" in page
    monkeypatch.setattr(Broken, "rows", [])
    with pytest.raises(ValueError, match="Number of rows"):
        Broken().save(Path("nothing"))
    assert not Path("nothing").exists()


@pytest.mark.parametrize(("name", "figures"), [("viz", 6), ("photos", 5)])
def test_a_notebook_shows_what_it_makes(
    name: str, figures: int, inverter_folder: Path, digit_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short, with tiny networks, and in this process: a kernel of its own would import all libraries again."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    path = ROOT / f"experiments/{name}.ipynb"
    notebook: Any = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    for need in notebook.metadata.needs:
        shutil.copytree(digit_shards / "train" if "shards" in need else inverter_folder, need)
    for folder in ("docs/digits", "src/featinv_pl/explore/examples"):
        shutil.copytree(ROOT / folder, folder)
    Path("experiments").mkdir()
    monkeypatch.chdir("experiments")
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    shell: Any = InteractiveShell()  # type: ignore[no-untyped-call]
    for cell in cells:
        done = shell.run_cell(cell.source)
        done.raise_error()
        shown = getattr(done.result, "_repr_png_", bytes)()[:4] == b"\x89PNG"
        figures -= shown
        # What is committed is what `make notebooks` has made of these very cells.
        assert cell.execution_count, f"{path}: not run. Run `make notebooks`."
        assert [*("image/png" in one.get("data", ()) for one in cell.outputs)] == [True] * shown + [False] * (
            len(cell.outputs) - shown
        )
    assert figures == 0
    assert path.stat().st_size < LARGEST
