"""Shard sets that lie elsewhere, here on a server of this machine."""

import contextlib
import gzip
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import MakeBatch
from featinv_pl.data import addresses
from featinv_pl.data.shards.datamodule import FeatureShards
from featinv_pl.data.shards.manifest import MANIFEST
from featinv_pl.errors import UserError
from featinv_pl.masking import masked
from shard_sets import write_set

SIZE = 10
ZEROS = bytes(1 << 16)
MANY = 150 << 20  # bytes, of which no more should come than a manifest may have


class Server(ThreadingHTTPServer):
    """Serves a folder, notes what was asked for, and answers badly where that is wanted."""

    daemon_threads, block_on_close = True, False

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        self.faults: dict[str, list[str]] = {}  # what to do wrong, one request after the other
        self.sent, self.ended = 0, threading.Event()
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.address = f"http://127.0.0.1:{self.server_port}"


class Handler(SimpleHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        faults = self.server.faults.get(self.path.rpartition("/")[2])
        fault = faults.pop(0) if faults else ""
        if not fault:
            super().do_GET()
            return
        if fault == "silent":
            self.server.ended.wait()
            return
        self.send_response(503 if fault == "busy" else 200)
        if fault == "dropped":
            self.send_header("Content-Length", "1000000")
        if fault == "bomb":
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        sent = {"dropped": ZEROS[:100], "bomb": gzip.compress(ZEROS)}.get(fault, ZEROS)
        with contextlib.suppress(OSError):  # the other side has had enough
            for _ in range(MANY // len(ZEROS) if fault == "endless" else 1):
                self.server.sent += self.wfile.write(sent)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@pytest.fixture
def server(make_batch: MakeBatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(addresses, "WAITS_S", (0.01, 0.01))
    write_set(tmp_path / "far/set", make_batch(SIZE), shard_size=4)
    with Server(tmp_path / "far") as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.ended.set()
        server.shutdown()


def shards(place: str, **more: Any) -> FeatureShards:
    return FeatureShards(val=place, batch_size=3, cache=Path("cache"), **more)


def keys(data: FeatureShards) -> list[str]:
    (loader,) = data.val_dataloader()
    return [key for batch in loader for key in batch["key"]]


def test_reads_over_http_and_keeps_what_it_has_fetched(server: Server, make_batch: MakeBatch, tmp_path: Path) -> None:
    place = f"{server.address}/set"
    data = shards(place, num_workers=2)
    assert server.asked == [f"/set/{MANIFEST}"]  # shards follow when they are wanted
    assert keys(data) == [f"0-{number}" for number in range(SIZE)]
    assert data.val is not None
    assert torch.equal(data.val[3]["images"], make_batch(SIZE)["images"][3])
    tars = [path for path in server.asked if path.endswith(".tar")]
    assert sorted(set(tars)) == [f"/set/clean-0000{number}.tar" for number in range(3)]

    server.asked.clear()
    assert len(keys(shards(place))) == SIZE
    assert server.asked == [f"/set/{MANIFEST}"]

    write_set(tmp_path / "far/other", make_batch(SIZE, seed=1), shard_size=4)
    shutil.rmtree(tmp_path / "far/set")
    (tmp_path / "far/other").rename(tmp_path / "far/set")
    assert keys(shards(place)) == [f"1-{number}" for number in range(SIZE)]  # another set at the same address


def test_what_was_damaged_on_the_way_is_never_kept(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "far/set/clean-00001.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"x")
    data = shards(f"{server.address}/set")
    with pytest.raises(UserError, match=r"'http.*' has a 'clean-00001\.tar' that its manifest does not describe"):
        keys(data)
    assert not list(Path("cache").rglob("clean-00001.tar*"))
    path.write_bytes(whole)
    assert len(keys(data)) == SIZE


@pytest.mark.parametrize(
    ("name", "faults", "message"),
    [
        (MANIFEST, ["endless"], r"of more than the 67108864 bytes that such a file may have"),
        (MANIFEST, ["bomb"], r"is damaged .*can't decode byte 0x8b"),  # as it was sent: not decompressed
        (MANIFEST, ["silent"] * 3, r"could not be fetched"),
        (MANIFEST, ["busy"] * 3, r"could not be fetched .*503"),
        ("clean-00001.tar", ["endless"], r"of more than the \d{5,6} bytes that its manifest says"),
        ("clean-00001.tar", ["dropped"] * 3, r"could not be fetched"),
    ],
)
def test_a_bad_server_is_refused(
    name: str, faults: list[str], message: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "silent" in faults:  # a busy machine may be silent for as long
        monkeypatch.setattr(addresses, "SILENCE_S", 0.2)
    server.faults[name] = faults
    with pytest.raises(UserError, match=message):
        keys(shards(f"{server.address}/set"))
    assert not faults
    assert server.sent < MANY
    assert not list(Path().rglob(f"cache/*/{name}*"))


def test_what_fails_once_is_tried_again(server: Server) -> None:
    server.faults = {MANIFEST: ["busy"], "clean-00000.json": ["dropped"], "clean-00001.tar": ["dropped", "busy"]}
    assert len(keys(shards(f"{server.address}/set"))) == SIZE
    assert server.asked.count("/set/clean-00001.tar") == 3


def test_credentials_are_used_but_not_told(server: Server, tmp_path: Path) -> None:
    place = server.address.replace("://", "://somebody:PASSWORD@") + "/{}?token=TOKEN"
    assert len(keys(shards(place.format("set")))) == SIZE
    assert f"/set/{MANIFEST}?token=TOKEN" in server.asked
    message = r"'http://\*\*\*@.*/nowhere\?\*\*\*' has a '.*' that could not be fetched"
    with pytest.raises(UserError, match=message) as caught:
        shards(place.format("nowhere"))
    assert not {"PASSWORD", "TOKEN"} & {*re.findall(r"\w+", str(caught.value))}
    (tmp_path / "far/set/clean-00002.json").unlink()
    shutil.rmtree("cache")
    with pytest.raises(UserError, match=r"`data\.val`: .*'clean-00002\.json' that could not be fetched"):
        keys(shards(f"{server.address}/set"))
    with pytest.raises(UserError, match=r"was saved without its credentials\. Give the address again"):
        shards(masked(place.format("set")))


def test_commands_run_if_the_environment_allows_it(
    make_batch: MakeBatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(addresses, "WAITS_S", ())
    write_set(tmp_path / "set", make_batch(SIZE), shard_size=4)
    place = f"pipe:touch ran; cat {tmp_path}/set/{{}}"
    with pytest.raises(UserError, match=r"runs a command on this machine.*FEATINV_ALLOW_PIPE=1"):
        shards(place)
    assert not Path("ran").exists()
    monkeypatch.setenv("FEATINV_ALLOW_PIPE", "1")
    assert len(keys(shards(place))) == SIZE
    with pytest.raises(UserError, match=r"could not be fetched .*exit status 1"):
        shards("pipe:cat nowhere/{}")
    with pytest.raises(UserError, match="of more than the 67108864 bytes"):
        shards("pipe:yes {}")


@pytest.mark.parametrize("place", ["ftp://h/x", "simplecache::https://h/x", "https://h/x::pipe:y", "PIPE:touch x"])
def test_other_addresses_are_refused(place: str) -> None:
    with pytest.raises(UserError, match=r"`data\.val`: .*(only http, https, s3 are read|runs a command)"):
        shards(place)


def test_s3_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match=r"s3://bucket/set' has a .*pip install 'featinv-pl\[s3\]'"):
        FeatureShards("s3://bucket/set", "s3://bucket/set", cache=tmp_path)
