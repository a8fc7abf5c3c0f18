"""The page on this machine, driven as people do: upload, draw, steer, interpolate."""

import importlib
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Locator, Page, expect, sync_playwright
from test_pages import ARGUMENTS, PHONE

from featinv_pl.__main__ import main
from featinv_pl.errors import UserError
from featinv_pl.explore.concepts import Concepts, difference_concepts, pairs_of_labels
from featinv_pl.explore.exploration import read_samples
from featinv_pl.inverter.pipeline import FeatInvPipeline
from interrupts import Capture, eventually

gradio = pytest.importorskip("gradio", reason="the page needs the extra: pip install 'featinv-pl[app]'")
PATIENCE = 60_000  # milliseconds: two cores, and other tests


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
    serving = threading.Thread(target=app.serve, args=(pipeline, concepts, "127.0.0.1", port), daemon=True)
    serving.start()

    def is_open() -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", port)) == 0

    assert eventually(is_open)
    yield f"http://127.0.0.1:{port}"
    built[0].close()
    assert not list((tmp_path / "uploads").rglob("*.*"))


def open_tab(page: Page, name: str) -> Locator:
    page.get_by_role("tab", name=name).click()
    return page.get_by_role("tabpanel").filter(visible=True)


def pictures(panel: Locator, count: int) -> None:
    """Wait for so many pictures in the gallery."""
    drawn = panel.locator(".grid-container img, .gallery-container img")
    expect(drawn).to_have_count(count, timeout=PATIENCE)


def test_upload_draw_steer_interpolate(address: str, chromium: str, picture: Path, other_picture: Path) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        page = browser.new_page(viewport=PHONE)
        page.set_default_timeout(PATIENCE)
        asked, problems = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(address)

        panel = open_tab(page, "Reconstruct")
        panel.get_by_role("button", name="Reconstruct").click()
        expect(page.get_by_text("Upload a picture first, and leave no field empty.")).to_be_visible()
        upload(panel, 0, picture)
        panel.get_by_role("button", name="Reconstruct").click()
        pictures(panel, 1 + 4)

        panel = open_tab(page, "Steer")
        upload(panel, 0, picture)
        panel.get_by_role("spinbutton").first.fill("2")
        panel.get_by_role("button", name="Steer").click()
        pictures(panel, 1 + 2)

        panel = open_tab(page, "Interpolate")
        upload(panel, 0, picture)
        upload(panel, 1, other_picture)
        panel.get_by_role("button", name="Interpolate").click()
        pictures(panel, 7)
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        browser.close()
    assert all(url.startswith((f"{address}/", "data:", "blob:")) for url in asked)
    assert not problems


def upload(panel: Locator, number: int, picture: Path) -> None:
    panel.locator("input[type=file]").nth(number).set_input_files(picture)
    expect(panel.locator(".image-frame img, .image-container img")).to_have_count(number + 1)


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
    assert f"--port: cannot listen at 127.0.0.1:{port}" in capsys.readouterr().err


def test_without_gradio(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where it is not installed: its import fails."""
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "featinv_pl.explore.app", raising=False)
    with pytest.raises(UserError, match="app: the page needs gradio, which is not installed"):
        importlib.import_module("featinv_pl.explore.app")
