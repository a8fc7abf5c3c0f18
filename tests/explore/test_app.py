"""The page on this machine, driven as people do, in every mode."""

import importlib
import json
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import httpx
import pytest
from playwright.sync_api import FrameLocator, Locator, Page, expect, sync_playwright
from test_pages import ARGUMENTS, PHONE

from featinv_pl.__main__ import main
from featinv_pl.errors import UserError
from featinv_pl.explore.concepts import Concepts, difference_concepts, pairs_of_labels
from featinv_pl.explore.exploration import read_samples
from featinv_pl.inverter.pipeline import FeatInvPipeline
from interrupts import Capture, eventually

gradio = pytest.importorskip("gradio", reason="the page needs the extra: pip install 'featinv-pl[app]'")
CAMERA = ("--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream")
PATIENCE = 60_000  # milliseconds: two cores, and other tests
expect.set_options(timeout=PATIENCE)


@pytest.fixture
def concepts(digit_shards: Path) -> Concepts:
    samples = read_samples([digit_shards / "train"], 100, "SHARDS")
    return difference_concepts(samples, pairs_of_labels(samples, [(4, 9)]), pooled=False)


@pytest.fixture
def address(
    pipeline: FeatInvPipeline, concepts: Concepts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    from featinv_pl.explore import app

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    built: list[Any] = []
    build = app.build

    def remember(*parts: Any) -> Any:
        built.append(build(*parts))
        return built[-1]

    monkeypatch.setattr(app, "build", remember)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
    # A thread that is not the main one returns from launch, and the server goes on.
    serving = threading.Thread(target=app.serve, args=(pipeline, "digits", concepts, "127.0.0.1", port), daemon=True)
    serving.start()

    def is_open() -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", port)) == 0

    assert eventually(is_open)
    yield f"http://127.0.0.1:{port}"
    built[0].close()
    assert not list((tmp_path / "uploads").rglob("*.*"))


def open_tab(page: Page, name: str) -> Locator:
    tab = page.get_by_role("tab", name=name)
    if not tab.count():  # on a phone
        page.get_by_label("More tabs").click()
        tab = page.locator(".overflow-dropdown button", has_text=name)
    tab.click()
    return page.get_by_role("tabpanel").filter(visible=True)


def upload(panel: Locator, number: int, picture: Path) -> None:
    panel.locator("input[type=file]").nth(number).set_input_files(picture)
    expect(panel.locator(".image-frame img, .image-container img")).to_have_count(number + 1)


def computed(page: Page, panel: Locator, name: str) -> tuple[FrameLocator, Any, dict[str, bytes]]:
    """Press the button of a form; what it shows, and the facts and pictures of its download."""
    shown = panel.locator("iframe")
    before = (shown.get_attribute("srcdoc") if shown.count() else None) or ""
    panel.get_by_role("button", name=name, exact=True).click()
    expect(shown).not_to_have_attribute("srcdoc", before)
    expect(panel.get_by_role("button", name="Download")).to_be_visible()
    with page.expect_download() as download:
        panel.get_by_text("Download the page").click()
    with ZipFile(download.value.path()) as archive:
        files = {path: archive.read(path) for path in archive.namelist()}
    [facts] = [json.loads(data) for path, data in files.items() if path.endswith(".json")]
    return panel.frame_locator("iframe"), facts, {path: data for path, data in files.items() if "pictures/" in path}


@pytest.fixture
def page(address: str, chromium: str) -> Iterator[Page]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=[*ARGUMENTS, *CAMERA])
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.set_default_timeout(PATIENCE)
        asked: list[str] = []
        problems: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(address)
        yield page
        browser.close()
    assert all(url.startswith((f"{address}/", "data:", "blob:", "about:")) for url in asked)
    assert not problems


def test_every_mode(page: Page, picture: Path, other_picture: Path) -> None:
    expect(page.get_by_role("heading", name="featinv-pl")).to_be_visible()
    expect(page.get_by_text("Model digits: classifier test_resnet, maps of 8x4x4")).to_be_visible()

    panel = open_tab(page, "Reconstruct")
    panel.get_by_role("button", name="Reconstruct", exact=True).click()
    expect(page.get_by_text("Choose a picture first, and leave no field empty.")).to_be_visible()
    panel.locator(".gallery-item").last.click()
    expect(panel.locator(".image-frame img")).to_have_count(1)
    shown, facts, drawn = computed(page, panel, "Reconstruct")
    assert (len(facts["samples"]), len(drawn)) == (4, 1 + 4 + 2)
    # All captions of the first row are beside the input, and above the fold.
    frame = panel.locator("iframe").bounding_box()
    captions = [one.bounding_box() for one in shown.locator(".tiles").first.locator("figcaption").all()]
    assert frame
    assert len(captions) == 1 + 4
    assert all(one and one["y"] + one["height"] < 800 and one["width"] >= 80 for one in captions)
    assert frame["x"] > 300
    panel.get_by_label("Seed").fill("1")
    _, _, others = computed(page, panel, "Reconstruct")
    assert [drawn[name] == others[name] for name in sorted(drawn)][:5] == [True, *[False] * 4]

    panel = open_tab(page, "Steer")
    upload(panel, 0, picture)
    panel.get_by_role("spinbutton").first.fill("2")
    _, facts, _ = computed(page, panel, "Steer")
    assert (facts["concept"], [step["strength"] for step in facts["steps"]]) == ("4-9", [0, 0.5, 1, 1.5, 2])

    panel = open_tab(page, "Interpolate")
    upload(panel, 0, picture)
    upload(panel, 1, other_picture)
    _, facts, _ = computed(page, panel, "Interpolate")
    assert (facts["mode"], len(facts["steps"])) == ("linear", 7)

    panel = open_tab(page, "Compose")
    panel.locator("tbody tr").last.click()
    expect(panel.locator(".image-frame img")).to_have_count(2)
    panel.get_by_role("spinbutton", name="Left").fill("8")
    panel.get_by_role("button", name="Compose", exact=True).click()
    expect(page.get_by_text("is not within the classifier's crop of 32x32 pixels")).to_be_visible(timeout=PATIENCE)
    panel.get_by_role("spinbutton", name="Width").fill("24")
    _, facts, _ = computed(page, panel, "Compose")
    assert facts["box"] == [16, 8, 16, 24]

    panel = open_tab(page, "Audit")
    upload(panel, 0, picture)
    panel.get_by_role("spinbutton", name="Samples").fill("4")
    _, facts, _ = computed(page, panel, "Audit")
    assert [len(one["samples"]["inverter"]) for one in facts["images"].values()] == [4]


def test_webcam_on_a_phone(page: Page) -> None:
    page.set_viewport_size(PHONE)
    panel = open_tab(page, "Audit")
    expect(panel.get_by_role("button", name="Audit", exact=True)).to_be_visible()
    panel = open_tab(page, "Reconstruct")
    panel.get_by_label("Capture from camera").click()
    panel.get_by_text("Click to Access Webcam").click()
    # A photo that is taken before the camera's first frame is empty.
    page.wait_for_function("[...document.querySelectorAll('video')].some(one => one.readyState >= 2 && one.videoWidth)")
    panel.get_by_label("capture photo").click()
    expect(panel.locator(".image-frame img")).to_have_count(1)
    shown, _, _ = computed(page, panel, "Reconstruct")
    expect(shown.locator("h1")).to_have_text("Reconstructions")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def test_only_its_own_pages_are_answered_and_uploads_are_bounded(address: str, picture: Path, tmp_path: Path) -> None:
    def status(upload: bytes | None = None, **headers: str) -> int:
        files = None if upload is None else {"files": ("picture.png", upload)}
        method, place = ("GET", "/config") if upload is None else ("POST", "/gradio_api/upload")
        return httpx.request(method, address + place, files=files, headers=headers, timeout=60).status_code

    port = address.rpartition(":")[2]
    assert status() == status(Origin=address) == status(Host=f"localhost:{port}") == 200
    assert status(Host=f"evil.example:{port}") == status(Origin="http://evil.example") == status(Origin="null") == 403
    assert status(Host=f"evil.example:{port}", Origin=f"http://evil.example:{port}") == status(Host="[") == 403
    assert status(picture.read_bytes()) == 200
    assert list((tmp_path / "uploads").rglob("*.png"))
    assert status(bytes(51 << 20)) == 413


def test_a_port_that_is_taken(inverter_folder: Path, capsys: Capture) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(SystemExit):
            main(["app", "--model", str(inverter_folder), "--port", str(port)])
    said = capsys.readouterr()
    assert said.out.startswith(f"Loading {inverter_folder}, then serving it at http://127.0.0.1:{port}")
    assert f"--port: cannot listen at 127.0.0.1:{port}" in said.err


def test_without_gradio(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where it is not installed: its import fails."""
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "featinv_pl.explore.app", raising=False)
    with pytest.raises(UserError, match="app: the page needs gradio, which is not installed"):
        importlib.import_module("featinv_pl.explore.app")
