"""The public command, from images to scores, on tiny networks; and what it says when something is wrong."""

import contextlib
import csv
import gc
import hashlib
import html
import json
import os
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from pyarrow import parquet
from timm.models import save_for_hf
from torch import Tensor

from conftest import random_inception
from featinv_pl.__main__ import main
from featinv_pl.data.shards.datamodule import FeatureShards
from featinv_pl.data.shards.manifest import read_manifest, write_manifest
from featinv_pl.data.shards.reader import ShardSet
from featinv_pl.data.shards.samples import collate_samples
from featinv_pl.data.shards.writer import ShardSetWriter
from featinv_pl.evaluation.per_source import PerSource
from featinv_pl.inverter.inverter import Inverter
from featinv_pl.nets.control import Encoder
from featinv_pl.sampling.sampler import Sampler
from featinv_pl.tasks.inversion import FeatureInversion
from tiny import TRAINER, extraction, inversion, joined, write


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory, classifier_folder: Path, prior_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("extraction")
    settings = extraction(
        classifier_folder, prior_folder, ["train", "val", "clean", "corrupted/contrast/3", "corrupted/pixelate/5"]
    )
    settings["trainer"] |= {"default_root_dir": str(folder)}
    settings["trainer"]["callbacks"][0]["init_args"]["folder"] = str(folder / "shards")
    main(["predict", "--config", write(folder / "extract.yaml", settings)])
    return folder / "shards"


def test_from_shards_to_scores(shards: Path, classifier_folder: Path, prior_folder: Path) -> None:
    config = write(Path("inversion.yaml"), inversion(classifier_folder, prior_folder, shards))
    main(["fit", "--config", config])
    assert torch.load("run/inversion.ckpt", weights_only=True)["global_step"] == 2
    main(["test", "--config", config, "--ckpt_path", "run/inversion.ckpt"])
    left = files(Path("run"))
    main(["validate", "--config", config, "--ckpt_path", "run/inversion.ckpt"])
    assert set(scores_of("run/validate")) >= {"val/cosine", "val/cosine.floor"}
    after = files(Path("run"))
    assert {name: after[name] for name in left} == left  # what test wrote is as it was
    assert {Path(name).parts[0] for name in after.keys() - left} == {"validate", "validate.yaml"}

    scores = scores_of()
    check_provenance(json.loads(Path("run/metrics.json").read_text())["provenance"], "test", prior_folder)
    check_provenance(json.loads(Path("run/validate/metrics.json").read_text())["provenance"], "validate", prior_folder)
    names = (
        *("cosine", "cosine_median", "cosine_flat", "cosine_pooled", "cosine_q05"),
        *("agreement@1", "agreement@5", "overlap@5", "label@1", "psnr", "ssim"),
    )
    distances = ("fd_test_resnet", "kd_test_resnet")
    for source in ("clean", "corrupted", "corrupted/contrast", "corrupted/contrast/3", "corrupted/pixelate/5"):
        for name in names:
            arms = ("", ".floor", ".ceiling", ".regression", ".neighbour")
            assert {f"{source}/{name}{arm}" for arm in arms} <= set(scores)
        for name in distances:
            assert {f"{source}/{name}{arm}" for arm in ("", ".ceiling", ".regression", ".neighbour")} <= set(scores)
            assert f"{source}/{name}.floor" not in scores
        floor, ceiling = scores[f"{source}/cosine.floor"], scores[f"{source}/cosine.ceiling"]
        assert (f"{source}/cosine_calibrated" in scores) == (ceiling > floor)
        if ceiling > floor:
            calibrated = (scores[f"{source}/cosine"] - floor) / (ceiling - floor)
            assert scores[f"{source}/cosine_calibrated"] == pytest.approx(calibrated, abs=1e-4)
    assert scores["corrupted/cosine"] == pytest.approx(
        (scores["corrupted/contrast/3/cosine"] + scores["corrupted/pixelate/5/cosine"]) / 2, abs=1e-6
    )
    for row in ("original", "autoencoder", "reconstruction"):
        for kind in ("first", "extremes"):
            assert Path(f"run/pictures/corrupted/contrast/3/{kind}/{row}.png").is_file()
    for stage in ("fit", "validate", "test"):
        assert yaml.safe_load(Path(f"run/{stage}.yaml").read_text())["model"]["class_path"].endswith("FeatureInversion")

    main(["report", "."])
    assert joined(json.loads(Path("metrics.json").read_text())["run"]) == scores
    page = Path("report.html").read_text()
    # Two plots, three rows for each of three sources, and two rows of extremes for each of two groups.
    assert page.count("data:image/png;base64,") == 2 + 3 * 3 + 2 * 2
    for arm in ("run", "autoencoder", "regression", "neighbour", "floor"):
        assert f"<td>{arm}</td>" in page
    assert not re.search(r'(src|href)="(?!data:)', page)  # it needs nothing but itself
    assert "<th>agreement@1 wrong</th>" in page

    shutil.copytree("run", "same")
    main(["report", "."])
    assert re.search(r"<td>60</td><td>(run|same) - (run|same)</td>\s*<td>0.000 ", Path("report.html").read_text())


def check_provenance(provenance: dict[str, Any], command: str, prior: Path) -> None:
    """Compare with what the files themselves say."""
    sha = hashlib.sha256()
    checkpoint = torch.load("run/inversion.ckpt", weights_only=True)
    for name, value in sorted(checkpoint["state_dict"].items()):
        sha.update(f"{name.removeprefix('control.')} {tuple(value.shape)}".encode() + value.numpy().tobytes())
    assert provenance["checkpoint"] == {"path": "run/inversion.ckpt", "step": 2, "digest": sha.hexdigest()}
    assert provenance["command"] == command
    assert abs(datetime.now(UTC) - datetime.fromisoformat(provenance["date"])).days < 1
    schedule = json.loads((prior / "scheduler/scheduler_config.json").read_text())
    assert provenance["model"]["schedule"]["beta_end"] == schedule["beta_end"]
    assert provenance["model"] == json.loads(json.dumps(checkpoint["inversion"]))
    assert provenance["sampling"]["samplers"]["inversion"]["steps"] == 2
    assert (provenance["sampling"]["precision"], provenance["sampling"]["seed"]) == ("32-true", 0)


def test_a_report_says_whose_scores_it_was_given(
    shards: Path, classifier_folder: Path, prior_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = inversion(classifier_folder, prior_folder, shards)
    settings["data"]["init_args"]["test"] = {"clean": str(shards / "clean")}
    config, checkpoint = write(Path("inversion.yaml"), settings), "run/inversion.ckpt"
    main(["fit", "--config", config])
    main(["test", "--config", config, "--ckpt_path", checkpoint])
    main(["report", "."])
    assert re.search(r"<li>run: tested on .*: step 2 of .*run/inversion.ckpt.* \(weights \w{8}\)", report := page())
    assert "has changed since" not in report
    document = json.loads(Path("run/metrics.json").read_text())

    state = torch.load(checkpoint, weights_only=True)
    next(iter(state["state_dict"].values())).add_(1)
    torch.save({**state, "global_step": 7}, checkpoint)  # as another training leaves it
    main(["report", "."])
    assert "has changed since: it holds step 7 now. Test again." in page()

    Path(checkpoint).unlink()  # a report does without
    tiles = Path("run/pictures/clean/first/tiles.json")
    facts = json.loads(tiles.read_text())
    tiles.write_text(json.dumps({**facts, "checkpoint": "0" * 64}))
    refused(["report", "."], capsys, "run/pictures/clean/first' are of other weights (00000000) than the scores in")
    tiles.write_text(json.dumps(facts))
    Path("run/metrics.json").write_text(json.dumps({**document, "samples": {"other": 60}}))
    refused(["report", "."], capsys, "of every one: 'run' has scores of other and pictures of clean, val. Test")
    document["provenance"]["command"] = "validate"
    Path("run/metrics.json").write_text(json.dumps(document))
    refused(["report", "."], capsys, "the scores in 'run/metrics.json' are those of `validate`, and a report shows")


def page() -> str:
    return html.unescape(Path("report.html").read_text())


def scores_of(folder: str = "run") -> dict[str, float]:
    return joined(json.loads(Path(folder, "metrics.json").read_text()))


def samples_of(source: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = parquet.read_table(f"run/samples/{source}.parquet").to_pylist()
    return rows


def assert_same(one: tuple[dict[str, float], list[Any]], other: tuple[dict[str, float], list[Any]]) -> None:
    """Equal but for the rounding of float32 in batches of other sizes."""
    assert one[0] == pytest.approx(other[0], abs=1e-4, rel=1e-4)
    for row, same in zip(one[1], other[1], strict=True):
        assert row == pytest.approx(same, abs=1e-4)


def test_scores_follow_from_the_samples(shards: Path, classifier_folder: Path, prior_folder: Path) -> None:
    config = write(Path("inversion.yaml"), inversion(classifier_folder, prior_folder, shards))
    main(["test", "--config", config, f"--model.judge={classifier_folder}"])
    document = json.loads(Path("run/metrics.json").read_text())
    scores, rows = joined(document), samples_of("clean")
    assert len(rows) == document["samples"]["clean"] == 60
    assert sorted({row["key"] for row in rows}) == [row["key"] for row in rows]
    for arm in ("", ".ceiling", ".floor", ".neighbour"):
        agreed = [row["predicted.original"] == row[f"predicted{arm}"] for row in rows]
        assert scores[f"clean/agreement@1{arm}"] == pytest.approx(sum(agreed) / 60)
        assert scores[f"clean/cosine{arm}"] == pytest.approx(sum(row[f"cosine{arm}"] for row in rows) / 60)
        # The judge is the backbone, so it must see what the backbone sees.
        assert scores[f"clean/judge_cosine{arm}"] == pytest.approx(scores[f"clean/cosine{arm}"], abs=1e-3)
    both = samples_of("corrupted/contrast/3") + samples_of("corrupted/pixelate/5")
    mean = sum(row["psnr"] for row in both) / len(both)
    assert scores["corrupted/psnr"] == pytest.approx(mean)
    assert scores["corrupted/cosine_relative"] == pytest.approx(scores["corrupted/cosine"] / scores["clean/cosine"])
    for arms in document["scores"].values():
        for found in (score for arm in arms.values() for score in arm.values() if "low" in score):
            assert found["low"] - 1e-9 <= found["value"] <= found["high"] + 1e-9
    with Path("run/scores.csv").open() as file:
        cells = {(row["source"], row["score"], row["arm"]): row for row in csv.DictReader(file)}
    assert len(cells) == len(scores)
    cell = cells["clean", "cosine", "ceiling"]
    expected = document["scores"]["clean"]["ceiling"]["cosine"]
    assert {name: float(cell[name]) for name in ("value", "low", "high")} == expected


def test_fid_and_kid_need_the_weights_of_inception(
    shards: Path, classifier_folder: Path, prior_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = inversion(classifier_folder, prior_folder, shards)
    few = ["--data.batch_size=8", "--trainer.limit_val_batches=2"]
    main(["validate", "--config", write(Path("inversion.yaml"), settings), *few])
    document = json.loads(Path("run/validate/metrics.json").read_text())
    assert "val/fd_test_resnet" in joined(document)
    assert not {"val/fid", "val/kid", "val/lpips"} & set(joined(document))
    assert [note.split(":")[0] for note in document["notes"]] == ["no fid and kid", "no lpips"]

    weights = random_inception(Path("random.pth"), monkeypatch)
    for module in ("metrics.weights", "evaluation.scorers"):  # fewer, for speed
        monkeypatch.setattr(f"featinv_pl.{module}.INCEPTION_FEATURES", 64)
    settings["trainer"]["callbacks"] = [{"class_path": "PerSource", "init_args": {"inception": str(weights)}}]
    main(["validate", "--config", write(Path("inversion.yaml"), settings), *few])
    scores = scores_of("run/validate")
    assert scores["val/fid"] > 0
    assert {"val/kid", "val/kid.ceiling"} <= set(scores)
    assert "val/fid.floor" not in scores


def test_plan_estimates_and_writes_nothing(
    shards: Path, classifier_folder: Path, prior_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(Path("inversion.yaml"), inversion(classifier_folder, prior_folder, shards))
    before = sorted(Path().rglob("*"))
    main(["test", "--config", config, "--plan"])
    printed = capsys.readouterr().out
    assert re.search(r"^corrupted/pixelate/5 +60 +\S+$", printed, re.MULTILINE)
    assert re.search(r"^all +180 +\S+$", printed, re.MULTILINE)
    assert "From 2 batches at" in printed
    assert sorted(Path().rglob("*")) == before
    refused(["fit", "--config", config, "--plan"], capsys, "--plan: only test, and predict with a ShardWriter")


def write_like(original: Path, folder: Path, labels: list[int], fooled: list[float] | None = None, **more: Any) -> None:
    """Write the first samples of a set under other labels."""
    samples = ShardSet(original, folder.name, "")
    settings: Any = {**samples.manifest["settings"], **more}
    settings["samples"] = settings["images"] = settings["batch_size"] = len(labels)
    writer = ShardSetWriter(folder, folder.name, settings, samples.manifest["provenance"])
    writer.begin()
    batch = collate_samples([{**samples[index], "labels": label} for index, label in enumerate(labels)])
    writer.add(batch if fooled is None else {**batch, "fooled": torch.tensor(fooled)})
    writer.flush()
    writer.finish()
    writer.close()


def test_sources_without_labels_are_scored_without_them(
    shards: Path, classifier_folder: Path, prior_folder: Path
) -> None:
    settings = inversion(classifier_folder, prior_folder, shards)
    write_like(shards / "clean", Path("ood"), [-1] * 20)
    settings["data"]["init_args"]["test"] = {"ood": "ood"}
    main(["test", "--config", write(Path("inversion.yaml"), settings)])
    scores = scores_of()
    assert {"ood/cosine", "ood/agreement@1", "ood/cosine.floor"} <= set(scores)
    assert not [name for name in scores if "label@1" in name]


def test_samples_of_a_map_are_compared(shards: Path, classifier_folder: Path, prior_folder: Path) -> None:
    settings = inversion(classifier_folder, prior_folder, shards)
    config = write(Path("inversion.yaml"), settings)
    main(["test", "--config", config])
    alone = scores_of()
    main(["test", "--config", config, "--model.num_samples=3", "--trainer.default_root_dir=several"])
    several = scores_of("several")
    assert {name: several[name] for name in alone} == pytest.approx(alone, abs=1e-6)  # the first sample is the same
    assert {name for name in several if "diversity" in name} == {
        f"{source}/diversity_{what}"
        for source in {name.rpartition("/")[0] for name in alone}
        for what in ("pixels", "maps")
    }
    assert several["clean/diversity_pixels"] > 0.01
    columns = parquet.read_table("several/samples/clean.parquet").column_names
    assert {"diversity_pixels", "diversity_maps"} <= set(columns)


def test_other_samplers_are_scored_beside(shards: Path, classifier_folder: Path, prior_folder: Path) -> None:
    settings = inversion(classifier_folder, prior_folder, shards)
    settings["model"]["init_args"] |= {
        "judge": str(classifier_folder),
        "arms": {
            "pooled": {"steps": 2},  # as a score of the maps ends
            "free": {"steps": 3, "guidance_scale": 1.0, "control_scale": 0.0, "refine": {"interval": [0, 1]}},
            "best": {"steps": 2, "best_of": 3},
        },
    }
    main(["test", "--config", write(Path("inversion.yaml"), settings)])
    scores = scores_of()
    for source in ("clean", "corrupted", "corrupted/contrast"):
        assert scores[f"{source}/cosine.pooled"] == pytest.approx(scores[f"{source}/cosine"], abs=1e-9)
        assert scores[f"{source}/psnr.pooled"] == pytest.approx(scores[f"{source}/psnr"], abs=1e-9)
        assert scores[f"{source}/cosine.best"] > scores[f"{source}/cosine"]
        assert scores[f"{source}/cosine.free"] > scores[f"{source}/cosine"]
        assert f"{source}/judge_cosine.free" in scores
    assert "predicted.free" in parquet.read_table("run/samples/clean.parquet").column_names
    folder = Path("run/pictures/clean/first")
    assert folder.joinpath("pooled.png").read_bytes() == folder.joinpath("reconstruction.png").read_bytes()
    assert folder.joinpath("free.png").read_bytes() != folder.joinpath("reconstruction.png").read_bytes()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a/b", r"--model\.arms: 'a/b' cannot be part"),
        ("reconstruction", r"--model\.arms: 'reconstruction' is what another arm"),
    ],
)
def test_names_of_samplers_must_be_their_own(
    name: str, message: str, shards: Path, classifier_folder: Path, prior_folder: Path, capsys: Any
) -> None:
    settings = inversion(classifier_folder, prior_folder, shards)
    settings["model"]["init_args"]["arms"] = {name: {"steps": 2}}
    with pytest.raises(SystemExit):
        main(["test", "--config", write(Path("inversion.yaml"), settings)])
    assert re.search(message, capsys.readouterr().err)


def test_notes_on_samples_and_labels(shards: Path, classifier_folder: Path, prior_folder: Path) -> None:
    settings = inversion(classifier_folder, prior_folder, shards)
    for name, size in (("single", 1), ("foreign", 4)):
        write_like(shards / "clean", Path(name), [10 + index for index in range(size)])
    write_like(shards / "clean", Path("alike"), [3] * 9, classes={"3": 3})
    settings["data"]["init_args"]["test"] = {name: name for name in ("single", "foreign", "alike")}
    settings["data"]["init_args"]["test"]["clean"] = str(shards / "clean")
    main(["test", "--config", write(Path("inversion.yaml"), settings)])
    document = json.loads(Path("run/metrics.json").read_text())
    notes = "\n".join(document["notes"])
    assert "single: 1 samples are too few for fd_test_resnet, which needs 2" in notes
    assert "single: 1 samples are too few for kd_test_resnet" in notes
    assert "foreign: 4 labels are none of the classifier's 10 classes" in notes
    assert "fd_test_resnet is biased upwards" in notes
    assert "such as in foreign and 1 others" in notes  # with 4 samples and 1, of 8 features
    scores = joined(document)
    assert "foreign/label@1" not in scores
    assert "alike: label@1" not in notes  # among one class there is nothing to choose
    assert scores["alike/label@1"] == np.mean([row["predicted"] == 3 for row in samples_of("alike")])
    assert {"single/cosine", "foreign/cosine", "clean/fd_test_resnet", "clean/label@1"} <= set(scores)
    assert "single/cosine.floor" not in scores  # there is no other image


def test_scores_of_part_of_the_classes_the_images_and_an_attack(
    shards: Path, classifier_folder: Path, prior_folder: Path
) -> None:
    settings = inversion(classifier_folder, prior_folder, shards)
    predicted = int(ShardSet(shards / "clean", "", "")[0]["logits"].argmax())  # for every image, by this classifier
    chosen = [predicted, *(label for label in range(1, 4) if label != predicted)][:3]
    labels = [chosen[row % 3] for row in range(20)]
    classes = {str(label): label for label in chosen} | {"unknown": -1}
    fooled = [[1.0, 0.0, float("nan")][row % 3] for row in range(20)]
    write_like(shards / "clean", Path("hard/one"), labels, fooled, classes=classes)
    settings["data"]["init_args"]["test"] = {"hard": "hard", "clean": str(shards / "clean")}
    main(["test", "--config", write(Path("inversion.yaml"), settings)])
    document = json.loads(Path("run/metrics.json").read_text())
    assert any("label@1 is taken over the 3 classes of the set" in note for note in document["notes"])
    scores, rows = joined(document), {row["key"]: row for row in samples_of("clean")}
    part, order = samples_of("hard/one"), [ShardSet(Path("hard/one"), "", "")[row]["key"] for row in range(20)]

    assert scores["hard/one/label@1_all"] == pytest.approx(np.mean([row["predicted"] == row["label"] for row in part]))
    assert scores["hard/label@1"] == scores["hard/one/label@1"]
    assert "clean/label@1_all" not in scores

    wrong = [row for row in part if row["predicted.original"] != row["label"]]
    for arm in ("", ".floor"):
        kept = [row[f"predicted{arm}"] == row["predicted.original"] for row in wrong]
        hits = [row[f"predicted{arm}"] == row["label"] for row in wrong]
        assert scores[f"hard/one/agreement@1_wrong{arm}"] == pytest.approx(np.mean(kept))
        assert scores[f"hard/one/label@1_wrong{arm}"] == pytest.approx(np.mean(hits))
        deceived = [row[f"predicted{arm}"] == row["label"] for row in part if fooled[order.index(row["key"])] == 1]
        assert scores[f"hard/one/label@1_fooled{arm}"] == pytest.approx(np.mean(deceived))
    assert document["scores"]["hard/one"]["inversion"]["agreement@1_wrong"]["n"] == len(wrong) < len(part)
    assert scores["hard/attack_success.original"] == pytest.approx(7 / 14)
    assert not [name for name in scores if name.startswith("clean/") and ("fooled" in name or "attack" in name)]

    clean = np.mean([rows[row["key"]]["cosine"] for row in part])
    assert scores["hard/cosine_relative"] == pytest.approx(scores["hard/cosine"] / clean)
    assert scores["hard/cosine_relative"] != pytest.approx(scores["hard/cosine"] / scores["clean/cosine"], abs=1e-6)
    gain = np.mean([row["cosine"] - row["cosine.neighbour"] for row in part])
    assert scores["hard/cosine_difference.neighbour"] == pytest.approx(gain)


def test_a_backbone_without_classes_is_scored_by_its_maps(
    classifier_folder: Path, prior_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    headless = timm.create_model(f"local-dir:{classifier_folder}", pretrained=True, num_classes=0)
    save_for_hf(headless, "headless", safe_serialization=True)
    settings = extraction(Path("headless"), prior_folder, ["clean"])
    main(["predict", "--config", write(Path("extract.yaml"), settings), "--trainer.limit_predict_batches=1"])
    settings = inversion(Path("headless"), prior_folder)
    settings["data"]["init_args"] |= {"train": None, "val": None, "test": {"clean": "shards/clean"}}
    main(["test", "--config", write(Path("inversion.yaml"), settings), "--model.judge=headless"])
    document = json.loads(Path("run/metrics.json").read_text())
    assert {"cosine", "cosine_pooled", "psnr", "judge_cosine"} <= document["scores"]["clean"]["inversion"].keys()
    assert not [name for name in joined(document) if "agreement" in name or "overlap" in name or "label" in name]
    assert [note for note in document["notes"] if "has no classes" in note]
    assert not [name for name in parquet.read_table("run/samples/clean.parquet").column_names if "predicted" in name]
    assert json.loads(Path("run/pictures/clean/first/tiles.json").read_text())["prediction"] == ["none"] * 3
    main(["report", "."])
    assert "<td>autoencoder</td>" in Path("report.html").read_text()
    settings["model"] = {"class_path": "AdversarialExtraction", "init_args": {"backbone": "headless"}}
    settings["model"]["init_args"]["autoencoder"] = str(prior_folder / "vae")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["predict", "--config", write(Path("attack.yaml"), {"model": settings["model"]})])
    assert "nothing to attack" in capsys.readouterr().err


class Interruption(Callback):
    """Stops a test in the middle."""

    def on_test_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if len(list(Path("run/drawn").glob("*.safetensors"))) == 3:
            raise KeyboardInterrupt


def test_interrupted_test_goes_on(
    shards: Path, classifier_folder: Path, prior_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = inversion(classifier_folder, prior_folder, shards)
    settings["model"]["init_args"]["arms"] = {"other": {"steps": 3}}
    config = write(Path("inversion.yaml"), settings)
    main(["test", "--config", config])
    whole = scores_of(), samples_of("clean")
    shutil.rmtree("run")
    settings["trainer"]["callbacks"].append({"class_path": f"{__name__}.Interruption"})
    with pytest.raises(SystemExit):
        main(["test", "--config", write(Path("interrupted.yaml"), settings)])
    assert not Path("run/metrics.json").exists()
    Path("run/drawn/damaged.safetensors").write_bytes(b"no")

    counts: list[int] = []
    invert = Inverter.reconstruct_from

    def counted(self: Inverter, features: Tensor, noise: Tensor, sampler: Sampler | None = None) -> Tensor:
        counts.append(len(features))
        return invert(self, features, noise, sampler)

    monkeypatch.setattr(Inverter, "reconstruct_from", counted)
    main(["test", "--config", config, "--data.batch_size=13"])  # another batch size finds them too
    assert sum(counts) == 2 * (180 - 3 * 16)  # by both samplers
    assert_same((scores_of(), samples_of("clean")), whole)
    counts.clear()
    fitted = Path("run/regression.safetensors").stat().st_mtime_ns
    main(["test", "--config", config])  # nothing is left to draw, and nothing to fit
    assert not counts
    assert Path("run/regression.safetensors").stat().st_mtime_ns == fitted
    main(["test", "--config", config, "--model.sampler.steps=1"])  # but another sampler draws anew
    assert sum(counts) == 180


def test_what_cannot_be_scored_does_not_stop_the_rest(
    shards: Path,
    classifier_folder: Path,
    prior_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = inversion(classifier_folder, prior_folder, shards)
    for name in ("empty", "lossy"):
        shutil.copytree(shards / "clean", name)
    manifest = read_manifest(Path("empty"), "")
    write_manifest(Path("empty"), {**manifest, "shards": [], "samples": 0})
    write_manifest(Path("lossy"), {**manifest, "settings": {**manifest["settings"], "image_format": "jpg"}})
    settings["data"]["init_args"] |= {"train": None, "test": {"clean": "lossy", "empty": "empty"}}
    settings["data"]["init_args"]["neighbours"] = str(shards / "clean")
    invert = Inverter.reconstruct_from

    def failing(self: Inverter, features: Tensor, noise: Tensor, sampler: Sampler | None = None) -> Tensor:
        images = invert(self, features, noise, sampler)
        images[0, 0, 0, 0] = torch.nan
        return images

    monkeypatch.setattr(Inverter, "reconstruct_from", failing)
    main(["test", "--config", write(Path("inversion.yaml"), settings)])
    document = json.loads(Path("run/metrics.json").read_text())
    printed = capsys.readouterr().out
    assert document["samples"] == {"clean": 56}  # the first of each batch of 16 is left out
    assert 0 < joined(document)["clean/cosine"] <= 1
    assert joined(document)["clean/cosine.neighbour"] == pytest.approx(1)  # found without training shards: itself
    missing = ("empty: left out", "clean: left out 4 samples, not finite", "no regression")
    for fragment in (*missing, "clean: the originals are stored as JPEGs"):
        assert any(fragment in note for note in document["notes"])
        assert fragment in printed


def test_scores_do_not_depend_on_the_batch_size(shards: Path, classifier_folder: Path, prior_folder: Path) -> None:
    config = write(Path("inversion.yaml"), inversion(classifier_folder, prior_folder, shards))
    results = []
    for size in ("7", "60"):
        shutil.rmtree("run", ignore_errors=True)
        main(["test", "--config", config, "--data.batch_size", size])
        results.append((scores_of(), samples_of("clean")))
    assert_same(*results)


def test_two_processes_score_as_one(shards: Path, classifier_folder: Path, prior_folder: Path) -> None:
    config = write(Path("inversion.yaml"), inversion(classifier_folder, prior_folder, shards))
    results = []
    for processes in ([], ["--trainer.devices=2", "--trainer.strategy=ddp_fork"]):
        shutil.rmtree("run", ignore_errors=True)
        main(["test", "--config", config, *processes])
        results.append((scores_of(), samples_of("clean")))
    assert_same(*results)


def test_scores_reach_who_calls_the_trainer(
    shards: Path, classifier_folder: Path, prior_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Trainer(**TRAINER, default_root_dir="run", callbacks=[PerSource(baselines=())])
    sampler = Sampler(steps=2)
    module = FeatureInversion(str(classifier_folder), str(prior_folder), 32, encoder=Encoder(8), sampler=sampler)
    [returned] = trainer.test(module, datamodule=FeatureShards(test={"clean": shards / "clean"}))
    assert returned == pytest.approx(scores_of(), rel=1e-6)
    assert {name: value.item() for name, value in trainer.callback_metrics.items()} == returned
    assert "Test metric" not in capsys.readouterr().out  # a line for each of them


def test_short_names_overrides_and_print_config(
    capsys: pytest.CaptureFixture[str], classifier_folder: Path, prior_folder: Path
) -> None:
    config = write(Path("inversion.yaml"), inversion(classifier_folder, prior_folder))
    with pytest.raises(SystemExit) as stop:
        main(["fit", "-c", config, "--model.objective.dropout=0.5", "--data.test.hard=here", "--print_config"])
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["init_args"]["objective"]["dropout"] == 0.5
    assert printed["data"]["init_args"]["test"]["hard"] == "here"


def test_base_lies_beneath(capsys: pytest.CaptureFixture[str]) -> None:
    Path("below").mkdir()
    write(Path("root.yaml"), {"trainer": {"max_steps": 1, "precision": 32, "callbacks": [{"class_path": "PerSource"}]}})
    write(Path("below/middle.yaml"), {"base": "../root.yaml", "trainer": {"max_steps": 2}})
    top = {"base": "below/middle.yaml", "trainer": {"callbacks+": [{"class_path": "ReconstructionGrid"}]}}
    config = write(Path("top.yaml"), {**top, "model": {"class_path": "Classifier", "init_args": CLASSIFIER}})
    with pytest.raises(SystemExit):
        main(["fit", "--config", config, "--print_config"])
    trainer = yaml.safe_load(capsys.readouterr().out)["trainer"]
    assert (trainer["max_steps"], trainer["precision"]) == (2, 32)
    names = [callback["class_path"].split(".")[-1] for callback in trainer["callbacks"]]
    assert names == ["PerSource", "ReconstructionGrid"]


CLASSIFIER: dict[str, Any] = {"model": "test_resnet", "num_classes": 10, "image_size": 32}


@pytest.mark.parametrize("command", [["--help"], ["fit", "--help"], ["demo", "--help"], ["verify", "--help"], []])
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):
        main(command)
    assert "usage: " in capsys.readouterr().out


def test_version_needs_no_torch() -> None:
    code = "import sys; from featinv_pl.__main__ import main; main(['--version']); assert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", result.stdout)


def test_a_reader_that_has_gone_is_no_error() -> None:
    read, written = os.pipe()
    os.close(read)
    result = subprocess.run([sys.executable, "-m", "featinv_pl"], stdout=written, stderr=subprocess.PIPE, check=False)
    os.close(written)
    assert (result.returncode, result.stderr) == (141, b"")


def test_who_has_no_home_is_told_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)  # as in a container
    refused(["--version"], capsys, "HOME: user 2147483641 has no entry in passwd", "Set HOME")


def test_a_path_may_have_several_lines_but_no_message(capsys: pytest.CaptureFixture[str]) -> None:
    refused(["report", "a\nb"], capsys, r"below 'a\nb', that is")


# Bad input: one message, a failing exit status, and nothing that was there is harmed.


def refused(args: list[str], capsys: pytest.CaptureFixture[str], *fragments: str) -> None:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(args)
    error = capsys.readouterr().err
    assert stop.value.code not in (0, None)
    for fragment in fragments:
        assert fragment in error
    assert "Traceback" not in error
    assert not Path("run").exists() or not list(Path("run").rglob("*.ckpt"))


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("--data.train=nowhere", ["--data.train: there is no folder 'nowhere'"]),
        ("--data.test.clean=nowhere", ["--data.test.clean: there is no folder 'nowhere'"]),
        (
            "--model.prior=nowhere",
            ["--model.prior: 'nowhere' is neither a folder nor a file"],
        ),
        ("--model.backbone=resnett50", ["'resnett50' is neither a folder nor a timm model", "Did you mean resnet50"]),
        ("--ckpt_path=nowhere.ckpt", ["--ckpt_path: there is no file 'nowhere.ckpt'"]),
        ("--model.dropuot=0.1", ["dropuot"]),
        ("--model.objective.dropout=lots", ["dropout"]),
        ("--data.batch_size=100000", ["--data.batch_size: a batch of 100000"]),
        ("--model.sampler.steps=0", ["--model.sampler.steps cannot be 0"]),
        (
            "--model.lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau",
            ["--model.lr_scheduler: ReduceLROnPlateau waits for a metric"],
        ),
        ("--trainer.default_root_dir=inversion.yaml", ["'inversion.yaml' cannot be a folder (File exists)"]),
        ("--trainer.default_root_dir=s3://bucket/run", ["--trainer.default_root_dir: 's3://bucket/run' is an address"]),
        ("--trainer.gradient_clip_algorithm=foo", ["error: --trainer: `gradient_clip_algorithm` foo is invalid"]),
    ],
)
def test_bad_options_are_refused(
    override: str,
    fragments: list[str],
    shards: Path,
    classifier_folder: Path,
    prior_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write(Path("inversion.yaml"), inversion(classifier_folder, prior_folder, shards))
    refused(["fit", "--config", config, override], capsys, *fragments)


def test_images_in_place_of_shards_are_refused(
    classifier_folder: Path, prior_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {**inversion(classifier_folder, prior_folder), "data": {"class_path": "DigitsData"}}
    refused(["fit", "--config", write(Path("images.yaml"), settings)], capsys, "reads feature shards, and DigitsData")


def test_typo_in_a_yaml_is_refused(
    shards: Path, classifier_folder: Path, prior_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = inversion(classifier_folder, prior_folder, shards)
    settings["model"]["init_args"]["hiden_channels"] = 3
    refused(["fit", "--config", write(Path("typo.yaml"), settings)], capsys, "hiden_channels")


def test_unknown_command_and_missing_yaml_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    refused(["train"], capsys, "no command 'train'")
    refused(["fit", "--config", "nowhere.yaml"], capsys, "nowhere.yaml")
    write(Path("top.yaml"), {"base": "nowhere.yaml"})
    refused(["fit", "--config", "top.yaml"], capsys, "error: base: there is no file")


def test_shards_of_another_backbone_are_refused(
    shards: Path, classifier_folder: Path, prior_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from featinv_pl.tasks.pretraining import Classifier

    torch.manual_seed(9)
    Classifier("test_resnet", 10, 32, {"output_stride": 8, "channels": [8, 8, 8, 8]}).save_pretrained(Path("other"))
    Classifier("test_resnet", 10, 32, {"output_stride": 16, "channels": [8, 8, 8, 16]}).save_pretrained(Path("wide"))
    for name, shape in (("other", "(8, 4, 4)"), ("wide", "(16, 2, 2)")):
        config = write(Path("inversion.yaml"), inversion(Path(name), prior_folder, shards))
        fragments = ("was made with the backbone", str(classifier_folder), f"is '{name}'", shape)
        refused(["fit", "--config", config], capsys, *fragments)


def test_shards_of_another_autoencoder_are_refused(
    shards: Path, classifier_folder: Path, prior_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(prior_folder, "prior")
    weights = Path("prior/vae/diffusion_pytorch_model.safetensors")
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights)
    config = write(Path("inversion.yaml"), inversion(classifier_folder, Path("prior"), shards))
    refused(["fit", "--config", config], capsys, "another autoencoder", "--model.prior 'prior'")


def test_checkpoint_of_another_model_is_refused(
    shards: Path, classifier_folder: Path, prior_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(Path("inversion.yaml"), inversion(classifier_folder, prior_folder, shards))
    main(["fit", "--config", config])
    shutil.move("run", "before")
    before = Path("before/inversion.ckpt").read_bytes()
    args = ["fit", "--config", config, "--ckpt_path", "before/inversion.ckpt"]
    refused([*args, "--model.conditioning=pooled"], capsys, "conditioning: spatial there, pooled here")
    refused([*args, "--model.encoder.hidden_channels=4"], capsys, "hidden_channels: 8 there, 4 here")
    foreign = {"state_dict": {"weight": torch.ones(1)}, "global_step": 1, "pytorch-lightning_version": "2.6.6"}
    torch.save(foreign, "foreign.ckpt")
    refused([*args[:-1], "foreign.ckpt"], capsys, "not one of a FeatureInversion")
    Path("damaged.ckpt").write_bytes(before[: len(before) // 2])
    refused([*args[:-1], "damaged.ckpt"], capsys, "damaged.ckpt")
    assert Path("before/inversion.ckpt").read_bytes() == before


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_finished_shards_are_never_overwritten(
    shards: Path, classifier_folder: Path, prior_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(shards, "shards")
    before = files(Path("shards/val"))
    config = write(Path("extract.yaml"), extraction(classifier_folder, prior_folder, ["val"]))
    main(["predict", "--config", config])
    assert "already holds the finished shard set" in capsys.readouterr().out
    refused(["predict", "--config", config, "--data.batch_size=15"], capsys, "batch_size: 30 there, 15 here")
    assert files(Path("shards/val")) == before


def test_map_of_the_wrong_shape_is_refused(
    shards: Path, classifier_folder: Path, prior_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(shards, "shards")
    manifest = read_manifest(Path("shards/train"), "")
    manifest["provenance"]["feature_shape"] = [8, 5, 5]
    write_manifest(Path("shards/train"), manifest)
    config = write(Path("inversion.yaml"), inversion(classifier_folder, prior_folder))
    refused(["fit", "--config", config], capsys, "maps of (8, 5, 5)", "maps of (8, 4, 4)")


def test_extraction_repeats_byte_for_byte(shards: Path, classifier_folder: Path, prior_folder: Path) -> None:
    main(["predict", "--config", write(Path("e.yaml"), extraction(classifier_folder, prior_folder, ["val"]))])
    for path in Path("shards/val").iterdir():
        assert path.read_bytes() == (shards / "val" / path.name).read_bytes()


class Recorder(Callback):
    """Notes whether Lightning keeps all predictions in memory."""

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        Path("kept").write_text(str(trainer.predict_loop.return_predictions))


def test_extraction_does_not_keep_its_predictions(classifier_folder: Path, prior_folder: Path) -> None:
    settings = extraction(classifier_folder, prior_folder, ["val"])
    settings["trainer"]["callbacks"].append({"class_path": f"{__name__}.Recorder"})
    main(["predict", "--config", write(Path("extract.yaml"), settings)])
    assert Path("kept").read_text() == "False"


def test_a_run_leaves_no_model_behind(classifier_folder: Path, prior_folder: Path) -> None:
    def trainers() -> int:
        gc.collect()
        return sum(isinstance(one, Trainer) for one in gc.get_objects())

    before = trainers()
    main(["predict", "--config", write(Path("extract.yaml"), extraction(classifier_folder, prior_folder, ["val"]))])
    assert trainers() == before


def test_every_command_runs_as_a_module() -> None:
    result = subprocess.run([sys.executable, "-m", "featinv_pl", "demo"], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == (
        "featinv-pl: error: demo: there is no folder 'experiments/digits' here. Run it from the project's folder.\n"
    )
