"""WebDataset tars and parquet files of a user's own images, read as folders are."""

import gzip
import io
import json
import shutil
import tarfile
import threading
from collections.abc import Iterator, Mapping
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from featinv_pl.__main__ import main
from featinv_pl.data import addresses
from featinv_pl.data.images.datamodule import FolderData
from featinv_pl.data.images.sources import FolderImages
from featinv_pl.data.images.tars import TarImages
from featinv_pl.data.shards.datamodule import FeatureShards
from featinv_pl.data.shards.manifest import read_manifest
from featinv_pl.errors import UserError
from interrupts import Capture, added, stopped
from tiny import ROOT, extraction, write

SIZE, SHARD = 21, 8
TOKEN = "hf_SecretOfTheTester"


def png(number: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (40, 48, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path | str, members: Mapping[str, Any]) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            content = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def pairs(suffix: str, labels: dict[str, str]) -> dict[str, Any]:
    """The members of images and their labels, by key."""
    members: dict[str, Any] = {}
    for number, (key, label) in enumerate(labels.items()):
        members |= {f"{key}.{suffix}": png(number), f"{key}.cls": label}
    return members


def tars_of(place: str, **more: Any) -> TarImages:
    return TarImages(place, "s", 16, cache=Path("cache"), **more)


def samples(place: str, **more: Any) -> dict[str, tuple[str, int]]:
    images = tars_of(place, **more)
    return {one.key: (one.class_name, one.labels) for one in map(images.__getitem__, range(len(images)))}


@pytest.fixture
def folder_and_tars() -> str:
    """The same images in a folder, and in three tars in the order in which the folder is read."""
    for number in range(SIZE):
        path = Path("images") / str(number % 3) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    order = [name.removesuffix(".png") for name, _ in FolderImages(Path("images"), "s", 32).names()]
    for part in range(3):
        members: dict[str, Any] = {}
        for name in order[part * 7 : part * 7 + 7]:
            members[f"{Path(name).name}.png"] = Path(f"images/{name}.png").read_bytes()
            members[f"{Path(name).name}.cls"] = name[0]
        write_tar(f"tars/part-{part}.tar", members)
    return "tars/part-{0..2}.tar"


@pytest.fixture
def config(classifier_folder: Path, prior_folder: Path, folder_and_tars: str) -> str:
    settings = extraction(classifier_folder, prior_folder, [])
    writer = {"class_path": "ShardWriter", "init_args": {"folder": "shards", "shard_size": SHARD}}
    settings["trainer"] |= {"enable_progress_bar": False, "default_root_dir": "run", "callbacks": [writer]}
    del settings["trainer"]["limit_predict_batches"]
    images = {"predict": {"mine": folder_and_tars}, "image_size": 32, "batch_size": 3, "cache": "cache"}
    settings["data"] = {"class_path": "FolderData", "init_args": images}
    return write(Path("extract.yaml"), settings)


def extract(config: str, *more: str) -> None:
    main(["predict", "--config", config, *more])


def read(folder: str) -> list[tuple[Any, ...]]:
    (loader,) = FeatureShards(val=Path(folder) / "mine", batch_size=1).val_dataloader()
    return [
        tuple(batch[name].numpy().tobytes() for name in ("images", "features", "logits", "moments", "labels"))
        for batch in loader
    ]


def test_tars_give_what_their_folder_gives(config: str) -> None:
    """Compressed ones too; and with their views, each a function of its key."""
    extract(config)
    extract(config, "--data.predict.mine=images", "--trainer.callbacks.folder=from-folder")
    assert read("shards") == read("from-folder")
    assert len(set(read("shards"))) == SIZE
    for path in Path("tars").iterdir():
        (path.parent / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    extract(config, "--data.predict.mine=tars/*.tar.gz", "--trainer.callbacks.folder=packed")
    tars, packed = ({p.name: p.read_bytes() for p in Path(f, "mine").iterdir()} for f in ("shards", "packed"))
    assert tars == packed


def test_resumes_byte_for_byte_in_two_processes_with_workers(config: str, capsys: Capture) -> None:
    extract(config, "--data.views=2", "--trainer.callbacks.folder=whole")
    code, _ = stopped(
        ["predict", "--config", config, "--data.views=2", *added("Interrupt", numbers=[15], step=4)], capsys
    )
    assert code == 143
    assert 0 < len([*Path("shards/mine").glob("*.tar")]) < 6
    extract(config, "--data.views=2", "--trainer.devices=2", "--trainer.strategy=ddp_fork", "--data.num_workers=2")
    whole, resumed = ({p.name: p.read_bytes() for p in Path(f, "mine").iterdir()} for f in ("whole", "shards"))
    assert whole == resumed
    assert read_manifest(Path("shards/mine"), "")["samples"] == 2 * SIZE


def test_damaged_members_are_counted_as_damaged_files_are(config: str, capsys: Capture) -> None:
    members = pairs("png", {str(number): "1" for number in range(5)})
    members |= {"2.png": png(2)[:300], "4.cls": b"\xff\xfe", "5.cls": "1"}
    write_tar("tars/part-1.tar", members)
    code, line = stopped(["predict", "--config", config], capsys)
    assert code == 1
    assert "--trainer.callbacks.max_bad_fraction: 1 of 20 images cannot be read" in line
    extract(config, "--trainer.callbacks.max_bad_fraction=0.2")
    told = {image["key"]: image["reason"] for image in read_manifest(Path("shards/mine"), "")["unreadable"]}
    assert set(told) == {"part-1.tar/2.png", "part-1.tar/4.png", "part-1.tar/5.cls"}
    assert "its label '4.cls' cannot be read" in told["part-1.tar/4.png"]
    assert told["part-1.tar/5.cls"] == "there is no image beside '5.cls'"
    with pytest.raises(UserError, match=r"'part-1\.tar/2\.png' cannot be read as an image"):
        [*FolderData(train="tars/part-1.tar", image_size=16, batch_size=6).train_dataloader()]


# Samples


def test_samples_are_those_of_webdataset() -> None:
    place = write_tar(
        "a.tar",
        {
            "dir/0.jpg": png(0), "dir/0.cls": "3", "dir/0.json": '{"label": 7}',
            "./1.JPEG": png(1), "./1.json": '{"label": 2, "caption": "x"}', "./1.depth.npy": b"",
            "2.webp": png(2), "2.json": '{"cls": "0"}', "2.mask.png": png(9),
            "3.png": png(3), "3.txt": "1\n",
            "4.png": png(4),
            "__meta__": "x", "._0.jpg": "x",
        },
    )  # fmt: skip
    found = samples(place)
    assert list(found) == [f"a.tar/{name}" for name in ("dir/0.jpg", "1.JPEG", "2.webp", "3.png", "4.png")]
    assert [*found.values()] == [("3", 3), ("2", 2), ("0", 0), ("1", 1), ("", -1)]
    theirs = [sample["__key__"] for sample in webdataset.WebDataset(place, shardshuffle=False, empty_check=False)]
    assert [key.removeprefix("./") for key in theirs] == [key[6:].rpartition(".")[0] for key in found]
    assert [name for name, _ in samples(place, label="json.label").values()] == ["7", "2", "", "", ""]
    assert {name for name, _ in samples(place, label="").values()} == {""}


def test_keys_may_have_dots() -> None:
    names = ("v1.a.0001", "v1.a.0002", "v1.b", "w.1")
    place = write_tar(
        "a.tar", {f"{n}.{s}": d for i, n in enumerate(names) for s, d in [("cls", str(i)), ("jpg", png(i))]}
    )
    assert samples(place) == {f"a.tar/{name}.jpg": (str(i), i) for i, name in enumerate(names)}


def test_labels_are_names_or_count_names() -> None:
    names = write_tar("names.tar", {"0.jpg": png(0), "0.txt": "owl", "1.jpg": png(1), "1.cls": "ant", "2.jpg": png(2)})
    assert [*samples(names).values()] == [("owl", 1), ("ant", 0), ("", -1)]
    numbers = write_tar("numbers.tar", pairs("jpg", {"2": "2", "0": "0"}))
    assert tars_of(numbers).classes == ("0", "1", "2")
    Path("classes.txt").write_text("ant\nbee\nowl\n")
    data = FolderData(numbers, names, image_size=16, batch_size=2, classes=Path("classes.txt"))
    assert data.classes == ("ant", "bee", "owl")
    assert data.train is not None
    assert data.val is not None
    assert [(one.class_name, one.labels) for one in (data.train[0], data.train[1])] == [("owl", 2), ("ant", 0)]
    assert [data.val[number].labels for number in range(3)] == [2, 0, -1]
    with pytest.raises(UserError, match=r"label 2, but `classes` has 2 names"):
        tars_of(numbers, classes=["ant", "bee"])


def test_the_first_of_each_class_by_name_across_tars() -> None:
    for part, names in enumerate(["db", "ca"]):
        write_tar(f"{part}.tar", pairs("jpg", dict.fromkeys(names, "0")))
    assert [*samples("{0..1}.tar", per_class=2)] == ["0.tar/b.jpg", "1.tar/a.jpg"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda tar: b"a text\n" * 200, r"'a\.tar' is not a complete tar"),
        (lambda tar: tar[: 3 * 512], "is not a complete tar"),
        (lambda tar: tar.replace(b"1.jpg\0", b"2.jpg\0"), "no member at byte"),  # whose header's sum is another
        (lambda tar: tar[: len(tar.rstrip(b"\0")) + -len(tar.rstrip(b"\0")) % 512], "no end mark at byte"),
        (None, r"holds no images, but members such as '0\.txt'"),
        ("nowhere.tar", r"there is no tar 'nowhere\.tar'"),
        ("no-*.tar", r"no file is called 'no-\*\.tar'"),
        ("{a,b/a}.tar", r"names two tars 'a\.tar'"),
        ("gs://bucket/a.tar", "of addresses only http, https, s3, hf are read"),
        ("https://there/folder", r"ends neither in \.tar"),
        ("pipe:touch marked; cat a.tar", "of addresses only"),
        ("https://a:***@there/a.tar", "saved without its credentials"),
    ],
)
def test_what_is_no_tar_of_images_is_told(spoil: Any, message: str) -> None:
    write_tar("a.tar", {"0.jpg": png(0), "1.jpg": png(1)} if spoil else {"0.txt": "words", "1.txt": "more words"})
    if callable(spoil):
        Path("a.tar").write_bytes(spoil(Path("a.tar").read_bytes()))
    with pytest.raises(UserError, match=message):
        tars_of(spoil if isinstance(spoil, str) else "a.tar")
    assert not Path("marked").exists()


# Addresses


class Hub(ThreadingHTTPServer):
    """A stand-in for the hub: answers as it does for one data set, whose files lie in a folder."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        self.tokens: dict[str, str] = {}
        self.asked: list[str] = []
        self.gated = False
        super().__init__(("127.0.0.1", 0), partial(Answer, directory=str(folder)))
        self.address = f"http://127.0.0.1:{self.server_port}"


class Answer(SimpleHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.server.tokens[self.path] = self.headers.get("Authorization") or ""
        if self.path.startswith("/api/datasets/timm/imagenet-1k-wds"):
            about: Any = {"id": "timm/imagenet-1k-wds", "sha": "0" * 40, "siblings": []}
            if "/tree/" in self.path:
                files = Path(self.directory).iterdir()
                about = [{"type": "file", "path": one.name, "size": one.stat().st_size, "oid": "0"} for one in files]
            body = json.dumps(about).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return
        if self.server.gated or self.path.startswith("/api/"):
            self.send_response(403 if self.server.gated else 401)
            self.send_header("X-Error-Code", "GatedRepo" if self.server.gated else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.path = "/" + self.path.partition("?")[0].rpartition("/")[2]
        super().do_GET()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(addresses, "WAITS_S", (0.01, 0.01))
    (tmp_path / "far").mkdir()
    with Hub(tmp_path / "far") as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        template = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE
        template = template.replace(huggingface_hub.constants.ENDPOINT, server.address)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server
        server.shutdown()


def test_imagenet_on_the_hub(config: str, hub: Hub, capfd: Capture) -> None:
    """The shipped file, on tars of the same layout; the token reaches the hub and nothing that is written."""
    for number in range(64):
        name, label = f"ILSVRC2012_val_{number + 1:08d}", number % 4
        about = {"label": label, "filename": f"{name}.JPEG"}
        members: dict[str, bytes | str] = {
            f"{name}.cls": str(label),
            f"{name}.jpg": png(number % 9),
            f"{name}.json": json.dumps(about),
        }
        write_tar(f"far/imagenet1k-validation-{number:02d}.tar", members)
    shipped = ROOT / "experiments/imagenet/extract/sources/hub.yaml"
    own = ["--trainer.callbacks.shard_size=16", "--data.batch_size=8"]
    settings = Path(config).read_text().replace("mine:", "val:")
    Path(config).write_text(settings)
    main(["predict", "--config", config, "--config", str(shipped), *own])
    manifest = read_manifest(Path("shards/val"), "")
    assert (manifest["samples"], manifest["unreadable"]) == (40, [])  # ten of each class
    (loader,) = FeatureShards(val=Path("shards/val"), batch_size=40).val_dataloader()
    (batch,) = loader
    assert batch["labels"].bincount().tolist() == [10] * 4
    assert batch["key"][0] == "imagenet1k-validation-00.tar/ILSVRC2012_val_00000001.jpg"
    assert {token for path, token in hub.tokens.items() if "/datasets/" in path} == {f"Bearer {TOKEN}"}
    assert sum("resolve" in path for path in hub.asked) == 64
    hub.asked.clear()
    shutil.rmtree("shards")
    main(["predict", "--config", config, "--config", str(shipped), *own])
    assert not [path for path in hub.asked if "/datasets/" in path]  # the second time, all is in the cache
    written = b"".join(path.read_bytes() for path in Path().rglob("*") if path.is_file())
    assert TOKEN.encode() not in written
    assert TOKEN not in "".join(capfd.readouterr())


def test_the_training_images_on_the_hub(config: str, hub: Hub) -> None:
    """All 1024 tars of the shipped file, with an image each, in a random view."""
    for number in range(1024):
        name = f"n{number % 4:08d}_{number}"
        write_tar(f"far/imagenet1k-train-{number:04d}.tar", {f"{name}.jpg": png(0), f"{name}.cls": str(number % 4)})
    shipped = ROOT / "experiments/imagenet/extract/sources/hub-train.yaml"
    Path(config).write_text(Path(config).read_text().replace("mine:", "train:"))
    more = ["--trainer.callbacks.shard_size=512", "--data.batch_size=64"]
    main(["predict", "--config", config, "--config", str(shipped), *more])
    manifest = read_manifest(Path("shards/train"), "")
    assert (manifest["samples"], manifest["unreadable"]) == (1024, [])


def test_an_address_is_fetched_once_and_keeps_its_secrets(hub: Hub) -> None:
    tar = Path(write_tar("far/a.tar", {"0.jpg": png(0), "0.cls": "3", "1.jpg": png(1), "1.cls": "1"})).read_bytes()
    Path("far/b.tar.gz").write_bytes(gzip.compress(tar))
    place = f"{hub.address}/{{a.tar,b.tar.gz}}"
    assert [label for _, label in samples(place).values()] == [3, 1, 3, 1]
    assert torch.equal(tars_of(place)[2].images, tars_of("far/a.tar")[0].images)
    assert len(hub.asked) == 2
    with pytest.raises(UserError, match=r"c\.tar\?\*\*\*' could not be fetched"):
        tars_of(f"{hub.address}/c.tar?token={TOKEN}")
    Path("far/d.tar.gz").write_bytes(gzip.compress(tar)[:200])
    for broken in (f"{hub.address}/d.tar.gz", "far/d.tar.gz"):
        with pytest.raises(UserError, match=r"d\.tar\.gz' (could not be fetched|cannot be decompressed)"):
            tars_of(broken)


def test_a_repository_that_is_gated_missing_or_out_of_reach(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated = True
    with pytest.raises(UserError, match=r"could not be fetched .*Accept its terms .* set HF_TOKEN") as told:
        tars_of("hf://datasets/timm/imagenet-1k-wds/a.tar")
    assert TOKEN not in str(told.value)
    hub.gated = False
    with pytest.raises(UserError, match=r"could not be fetched .*repository not found"):
        tars_of("hf://datasets/no/such/a.tar")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"could not be fetched .*[Oo]ffline"):
        tars_of("hf://datasets/not/asked/a.tar")


# Parquet files


def test_parquet_files_of_the_hub() -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["owl", "ant"])})
    rows: dict[str, Any] = {"image": [{"bytes": png(n), "path": None} for n in range(5)], "label": [0, 1, 1, -1, 0]}
    rows["image"][2]["bytes"] = png(2)[:100]
    datasets.Dataset.from_dict(rows, features).to_parquet("rows-0.parquet")
    data = FolderData(predict={"mine": "rows-*.parquet"}, image_size=16, batch_size=5, cache=Path("cache"))
    ((batch,),) = data.predict_dataloader()
    assert batch["class_name"] == ["owl", "ant", "ant", "", "owl"]
    assert batch["labels"].tolist() == [0, 1, 1, -1, 0]
    assert [bool(reason) for reason in batch["unreadable"]] == [False, False, True, False, False]
    write_tar("a.tar", {"0.png": png(4)})
    assert torch.equal(batch["images"][4], tars_of("a.tar")[0].images)
    numbered = FolderData(
        predict={"mine": "rows-0.parquet"}, image_size=16, per_class=1, classes=["a", "b"], cache=Path("cache")
    )
    assert [name for _, name in numbered.predicted[0].names()] == ["a", "b", ""]
    with pytest.raises(UserError, match=r"no column of a label \(kind\), but image, label"):
        FolderData(train="rows-0.parquet", label="kind", cache=Path("cache"))
    Path("text.parquet").write_text("words")
    with pytest.raises(UserError, match=r"`data\.train`: 'text\.parquet' cannot be read as a data set"):
        FolderData(train="text.parquet", cache=Path("cache"))
