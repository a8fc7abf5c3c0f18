"""Models go to the hub and come back, through its own client and a local stand-in of its HTTP API."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from huggingface_hub import constants

from featinv_pl.errors import UserError
from featinv_pl.inverter.pipeline import FeatInvPipeline

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """One repository, `org/digits`; whoever has another token than `mine` may not write."""

    files: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[str]] = []

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": SHA, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.asked.append(self.path)
        address = f"http://{self.headers['Host']}/org/digits"
        found: dict[str, Any] = {"errors": [], "warnings": [], "url": address, "name": "org/digits", "id": "org/digits"}
        if self.headers.get("Authorization") != "Bearer mine":
            self.answer(b'{"error": "Invalid token"}', 401, Content_Type="application/json")
            return
        if "/preupload/" in self.path:
            names = [one["path"] for one in json.loads(body)["files"]]
            found = {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            found = {"commitUrl": f"{address}/commit/{SHA}", "commitOid": SHA, "success": True}
        self.answer(json.dumps(found).encode(), Content_Type="application/json")

    def do_GET(self) -> None:
        self.asked.append(self.path)
        place = self.path.partition("?")[0]
        if "/resolve/" in place:
            body = self.files.get(place.partition("/resolve/")[2].partition("/")[2])
            if body is None:
                self.answer(b"", 404, X_Error_Code="EntryNotFound")
            else:
                self.answer(body, ETag=f'"{hashlib.sha1(body).hexdigest()}"')
        elif "/tree/" in place:
            listed = [
                {"type": "file", "path": name, "size": len(body), "oid": "0"} for name, body in self.files.items()
            ]
            self.answer(json.dumps(listed).encode(), Content_Type="application/json")
        else:
            siblings = [{"rfilename": name} for name in self.files]
            found = {"id": "org/digits", "sha": SHA, "siblings": siblings}
            self.answer(json.dumps(found).encode(), Content_Type="application/json")

    do_HEAD = do_GET  # noqa: N815 (the base class's name)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    Hub.files, Hub.asked = {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    for name, value in {
        "HF_HUB_OFFLINE": False,
        "ENDPOINT": endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_DISABLE_XET": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    yield endpoint
    server.shutdown()
    server.server_close()


def test_a_model_is_pushed_and_fetched_again(hub: str, inverter_folder: Path) -> None:
    pipeline = FeatInvPipeline.from_pretrained(inverter_folder)
    address = pipeline.push_to_hub("org/digits", token="mine", revision="tried", license="mit")
    assert address == f"{hub}/org/digits/commit/{SHA}"
    assert any("/branch/tried" in path for path in Hub.asked)
    assert any("/commit/tried" in path for path in Hub.asked)
    assert {"model_index.json", "SHA256SUMS", "README.md"} <= Hub.files.keys()
    fetched = FeatInvPipeline.from_pretrained("org/digits", revision="tried")
    assert any(path.startswith("/api/models/org/digits/revision/tried") for path in Hub.asked)
    for name, value in fetched.inverter.control.state_dict().items():
        assert torch.equal(value, pipeline.inverter.control.state_dict()[name])


def test_a_push_without_leave_is_refused(hub: str, pipeline: FeatInvPipeline) -> None:
    with pytest.raises(UserError, match=rf"^`repo_id`: 'org/digits' could not be pushed to {hub} .*hf auth login"):
        pipeline.push_to_hub("org/digits", token="another")
    assert not Hub.files
