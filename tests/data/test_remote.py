"""Shard sets that lie elsewhere, here on a server of this machine."""

import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from shard_sets import write_set

from conftest import MakeBatch
from featinv_pl.data.feature_shards import FeatureShards
from featinv_pl.data.manifests import MANIFEST
from featinv_pl.errors import UserError

SIZE = 10


class Server(ThreadingHTTPServer):
    """Serves a folder, and notes what was asked for."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        self.server.asked.append(self.path)
        super().do_GET()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@pytest.fixture
def server(make_batch: MakeBatch, tmp_path: Path) -> Iterator[Server]:
    write_set(tmp_path / "far/set", make_batch(SIZE), shard_size=4)
    with Server(tmp_path / "far") as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()


def shards(place: str, **more: Any) -> FeatureShards:
    return FeatureShards(val=place, batch_size=3, cache=Path("cache"), **more)


def keys(data: FeatureShards) -> list[str]:
    (loader,) = data.val_dataloader()
    return [key for batch in loader for key in batch["key"]]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_reads_over_http_and_keeps_what_it_has_fetched(
    server: Server, num_workers: int, make_batch: MakeBatch, tmp_path: Path
) -> None:
    place = f"{server.address}/set"
    data = shards(place, num_workers=num_workers)
    assert server.asked == [f"/set/{MANIFEST}"]  # shards follow when they are wanted
    assert keys(data) == [f"0-{number}" for number in range(SIZE)]
    assert data.val is not None
    assert torch.equal(data.val[3]["images"], make_batch(SIZE)["images"][3])
    tars = [path for path in server.asked if path.endswith(".tar")]
    assert sorted(set(tars)) == [f"/set/clean-0000{number}.tar" for number in range(3)]

    server.asked.clear()
    shutil.rmtree(tmp_path / "far/set", ignore_errors=False)
    write_set(tmp_path / "far/set", make_batch(SIZE), shard_size=4)
    assert len(keys(shards(place, num_workers=num_workers))) == SIZE
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
    with pytest.raises(UserError, match=r"'clean-00001\.tar' of 'http.*' is not the file that its manifest describes"):
        keys(data)
    assert not list(Path("cache").rglob("clean-00001.tar*"))
    path.write_bytes(whole)
    assert len(keys(data)) == SIZE


def test_what_is_not_there_is_one_message(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--data\.val: 'manifest\.json' could not be fetched from 'http"):
        shards(f"{server.address}/nowhere")
    (tmp_path / "far/set/clean-00002.json").unlink()
    with pytest.raises(UserError, match=r"'clean-00002\.json' could not be fetched"):
        keys(shards(f"{server.address}/set"))


def test_commands_run_only_if_they_are_allowed(make_batch: MakeBatch, tmp_path: Path) -> None:
    write_set(tmp_path / "set", make_batch(SIZE), shard_size=4)
    place = f"pipe:touch ran; cat {tmp_path}/set/{{}}"
    with pytest.raises(UserError, match=r"runs a command on this machine.*--data\.allow_pipe=true"):
        shards(place)
    assert not Path("ran").exists()
    assert len(keys(shards(place, allow_pipe=True))) == SIZE
    with pytest.raises(UserError, match=r"could not be fetched .*exit status 1"):
        shards("pipe:cat nowhere/{}", allow_pipe=True)


@pytest.mark.parametrize(
    "place",
    ["python://x", "ftp://h/x", "simplecache::https://h/x", "https://h/x::pipe:y", "file:///etc", "PIPE:touch x"],
)
def test_other_addresses_are_refused(place: str) -> None:
    with pytest.raises(UserError, match=r"--data\.val: .*(only http, https, s3 are read|runs a command)"):
        shards(place)
