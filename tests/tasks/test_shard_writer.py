"""Extraction by the public command: plans, views, interruptions, images that cannot be read."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from featinv_pl.__main__ import main
from featinv_pl.data.images.sources import FolderImages
from featinv_pl.data.shards.datamodule import FeatureShards
from featinv_pl.data.shards.manifest import read_manifest
from featinv_pl.tasks.extraction import FeatureExtraction
from interrupts import Capture, added, stopped
from tiny import extraction, write

WNIDS = ("n01440764", "n01443537", "n02123045")
SIZE = 21


@pytest.fixture
def config(classifier_folder: Path, prior_folder: Path) -> str:
    """Seven images of each of three classes, in shards of eight, and a classifier that knows two of them."""
    shutil.copytree(classifier_folder, "classifier")
    names = json.loads(Path("classifier/config.json").read_text())
    names["label_names"] = ["owl", WNIDS[2], "ant", *"abcdef", WNIDS[0]]
    Path("classifier/config.json").write_text(json.dumps(names))
    for number in range(SIZE):
        path = Path("images") / WNIDS[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((48, 40), 10 + number).convert("RGB").save(path)
    settings = extraction(Path("classifier"), prior_folder, [])
    writer = {"class_path": "ShardWriter", "init_args": {"folder": "shards", "shard_size": 8}}
    settings["trainer"] |= {"enable_progress_bar": False, "default_root_dir": "run", "callbacks": [writer]}
    del settings["trainer"]["limit_predict_batches"]
    images = {"predict": {"mine": "images"}, "image_size": 32, "batch_size": 3}
    settings["data"] = {"class_path": "FolderData", "init_args": images}
    return write(Path("extract.yaml"), settings)


def extract(config: str, *more: str) -> None:
    main(["predict", "--config", config, *more])


def refused(capsys: Capture, config: str, *more: str) -> str:
    code, line = stopped(["predict", "--config", config, *more], capsys)
    assert code == 1
    return line


def files(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (Path(folder) / "mine").iterdir()}


def test_labels_views_and_storage(config: str, capsys: Capture) -> None:
    extract(config, "--data.views=2", "--trainer.callbacks.storage=int8", "--trainer.callbacks.image_format=jpg")
    manifest = read_manifest(Path("shards/mine"), "")
    assert manifest["samples"] == 2 * SIZE
    assert manifest["settings"]["storage"] == "int8"
    assert "2 views of seed 0" in manifest["settings"]["preparation"]
    (loader,) = FeatureShards(val=Path("shards/mine"), batch_size=100).val_dataloader()
    (batch,) = loader
    classes = {"n01440764": 9, "n01443537": -1, "n02123045": 1}
    assert manifest["settings"]["classes"] == classes
    assert "mine: 1 of 3 classes, such as 'n01443537', are not among" in capsys.readouterr().err
    assert [classes[key.split("/")[0]] for key in batch["key"]] == batch["labels"].tolist()
    assert {key.split("#")[1] for key in batch["key"][:SIZE]} == {"0"}
    assert len(set(batch["key"])) == 2 * SIZE


def test_resumes_byte_for_byte_also_in_three_processes(config: str, capsys: Capture) -> None:
    extract(config, "--data.views=2", "--trainer.callbacks.folder=whole")
    for after in (11, 4):
        interrupt = added("Interrupt", numbers=[15], step=after)
        code, line = stopped(["predict", "--config", config, "--data.views=2", *interrupt], capsys)
        assert code == 143
        assert line.endswith("stopped by SIGTERM; the same command resumes what is not done yet.")
    kept = sorted(path.name for path in Path("shards/mine").glob("*.tar"))
    assert kept == [f"mine-0000{number}.tar" for number in range(4)]  # two are left: nothing for one of the processes
    extract(config, "--data.views=2", "--trainer.devices=3", "--trainer.strategy=ddp_fork", "--data.num_workers=1")
    assert files("shards") == files("whole")


def test_the_autoencoder_in_bfloat16_where_it_is_asked_for_or_exact_enough(config: str, capsys: Capture) -> None:
    extract(config)
    assert "autoencoder_dtype" not in read_manifest(Path("shards/mine"), "")["settings"]
    assert "autoencoder_dtype: None there, bfloat16" in refused(capsys, config, "--model.autoencoder_dtype=bfloat16")
    extract(config, "--model.autoencoder_dtype=bfloat16", "--trainer.callbacks.folder=fast")
    assert read_manifest(Path("fast/mine"), "")["settings"]["autoencoder_dtype"] == "bfloat16"
    exact, fast = (
        next(iter(FeatureShards(val=Path(folder, "mine"), batch_size=SIZE).val_dataloader()[0]))
        for folder in ("shards", "fast")
    )
    assert torch.equal(exact["features"], fast["features"])
    error = (exact["moments"].float() - fast["moments"].float()).std() / exact["moments"].float().std()
    assert 1e-4 < error < 0.03

    settings = yaml.safe_load(Path(config).read_text())["model"]["init_args"]
    extraction, images = FeatureExtraction(**settings), FolderImages(Path("images"), "mine", 32)
    head: Any = extraction.autoencoder.vae.quant_conv
    for log_variance, chosen in ((0.0, "bfloat16"), (-20.0, "float32")):  # spreads of 1 and of 5e-5
        head.weight.data[4:], head.bias.data[4:] = 0, log_variance
        assert extraction.measured_dtype(images, torch.device("cpu")) == chosen
    assert extraction.choose_dtype(images, torch.device("cpu")) == "float32"  # where it is not measured


def test_unreadable_images_are_named_or_too_many(config: str, capsys: Capture) -> None:
    bad = Path("images") / WNIDS[0] / "3.png"
    bad.write_bytes(bad.read_bytes()[:200])
    error = refused(capsys, config)
    assert re.search(r"max_bad_fraction: 1 of 21 images cannot be read, the last of them 'n01440764/3\.png' \(", error)
    assert not Path("shards/mine/manifest.json").exists()
    extract(config, "--trainer.callbacks.max_bad_fraction=0.05")
    manifest = read_manifest(Path("shards/mine"), "")
    assert manifest["samples"] == SIZE - 1
    assert [image["key"] for image in manifest["unreadable"]] == ["n01440764/3.png"]
    main(["verify", "shards"])
    assert "20 samples, 1 unreadable images" in capsys.readouterr().out


def test_plan_writes_nothing_and_tells_all(config: str, capsys: Capture) -> None:
    extract(config, "--plan", "--data.views=2")
    printed = capsys.readouterr().out
    assert re.search(r"^mine +42 +6 +42 +0\.00\d$", printed, re.MULTILINE)
    size = re.search(r"42 samples of ([\d.]+) kB: 0\.\d+ GB, and about 0\.\d+ hours on 1 process of", printed)
    assert size is not None
    assert not Path("shards").exists()
    assert not Path("run").exists()
    extract(config, "--data.views=2", "--trainer.limit_predict_batches=4")
    assert [shard["samples"] for shard in read_manifest(Path("shards/mine"), "")["shards"]] == [8, 3]
    shutil.rmtree("shards")
    extract(config, "--data.views=2")
    tars = sum(path.stat().st_size for path in Path("shards/mine").glob("*.tar"))
    assert float(size[1]) * 42 * 1000 == pytest.approx(tars, rel=0.1)
    capsys.readouterr()
    extract(config, "--plan", "--data.views=2")
    assert re.search(r"^mine +42 +6 +0 +0\.000$", capsys.readouterr().out, re.MULTILINE)


def test_a_disk_that_is_too_small_is_refused(config: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test can fill a disk, so this one says that it is full."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    for plan in ([], ["--plan"]):
        assert "need about 0.00 GB" in refused(capsys, config, *plan)
        assert not Path("shards/mine/manifest.json").exists()


def test_refuses_what_cannot_be_extracted(config: str, capsys: Capture) -> None:
    assert "nothing to extract features of" in refused(capsys, config, "--data.predict=null")
    assert "must be a whole number of batches" in refused(capsys, config, "--trainer.limit_predict_batches=0.5")
    assert "is a share of 0 to 1" in refused(capsys, config, "--trainer.callbacks.max_bad_fraction=2")
    assert "--dry_run: only test with an Evaluation, and predict with a ShardWriter" in refused(
        capsys, config, "--plan", "--trainer.callbacks=null"
    )
    Image.new("RGB", (8, 8)).save("images/stray.png")
    assert "'images' holds images, such as 'stray.png', beside folders" in refused(capsys, config)
