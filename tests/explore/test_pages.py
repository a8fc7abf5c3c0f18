"""Every page in a real browser of a phone's width: nothing missing, nothing fetched, nothing to scroll sideways."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from matplotlib.figure import Figure
from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from featinv_pl.__main__ import main
from featinv_pl.pages.page import Report, Section, Tile

ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
PHONE: Any = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def commands(inverter_folder: Path, digit_shards: Path, picture: Path, other_picture: Path) -> dict[str, list[str]]:
    model, two = ["--model", str(inverter_folder)], [str(picture), str(other_picture)]
    train = str(digit_shards / "train")
    return {
        "examples": ["concepts", train, "--num_concepts", "2"],
        "steering": ["steer", *model, two[0], "--concepts", "found", "--num_samples", "2"],
        "interpolation": ["interpolate", *model, *two, "--real", train],
        "composition": ["compose", *model, *two, "--box", "0,0,16,32"],
        "comparison": ["compare", *two, "--models", str(inverter_folder), str(inverter_folder)],
    }


@pytest.mark.parametrize("name", ["examples", "steering", "interpolation", "composition", "comparison"])
def test_page_on_a_phone(name: str, commands: dict[str, list[str]], browser: Browser) -> None:
    main([*commands["examples"], "--out", "found"])
    main([*commands[name], "--out", "out"])
    problems: list[str] = []
    page = browser.new_page(viewport=PHONE)
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: problems.append(request.url) if request.url.startswith("http") else None)
    page.goto(Path(f"out/{name}.html").absolute().as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    widths = page.evaluate("[...document.images].map(image => [image.complete, image.naturalWidth, image.width])")
    assert len(widths) >= 4
    assert all(complete and natural > 0 and shown >= 80 for complete, natural, shown in widths)
    alternatives = page.evaluate("[...document.images].map(image => image.alt)")
    assert all(alternatives)
    assert page.locator("h1").count() == 1
    page.close()
    assert not problems
    with Image.open(f"out/{name}.png") as figure:
        assert min(figure.size) > 300
    json.loads(Path(f"out/{name}.json").read_text())


class Broken(Report):
    """A report whose figure cannot be drawn."""

    name: ClassVar[str] = "broken"
    title, lead = "<b>", "broken"

    def sections(self) -> list[Section]:
        return [Section("one", rows=[[Tile(Image.new("RGB", (4, 4)), "<script>")]])]

    def facts(self) -> dict[str, Any]:
        return {}


def test_text_is_no_markup() -> None:
    Broken().save(Path("out"))
    page = Path("out/broken.html").read_text()
    assert "&lt;script&gt;" in page
    assert "<script>" not in page
    assert "&lt;b&gt;" in page


def test_nothing_is_written_of_a_report_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Report) -> Figure:
        raise RuntimeError("no figure")

    monkeypatch.setattr(Broken, "figure", fail)
    with pytest.raises(RuntimeError, match="no figure"):
        Broken().save(Path("out"))
    assert not Path("out").exists()
