"""The Evaluation callback through the public command, from shards to scores and a report, on tiny networks."""

import contextlib
import csv
import gc
import hashlib
import html
import json
import re
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import timm
import torch
import yaml
from lightning.pytorch import Trainer
from pyarrow import parquet
from safetensors.torch import load_file
from timm.models import save_for_hf
from torch import Tensor

from conftest import random_inception
from featinv_pl.__main__ import main
from featinv_pl.data.shards.datamodule import FeatureShards
from featinv_pl.data.shards.manifest import read_manifest, write_manifest
from featinv_pl.data.shards.reader import ShardSet
from featinv_pl.data.shards.samples import collate_samples
from featinv_pl.errors import UserError
from featinv_pl.evaluation.callback import Evaluation
from featinv_pl.evaluation.scores import Scores
from featinv_pl.inverter.inverter import Inverter
from featinv_pl.metrics.distances import Distance
from featinv_pl.metrics.estimates import wilson
from featinv_pl.sampling.sampler import Sampler
from featinv_pl.tasks.inversion import FeatureInversion
from interrupts import Capture
from shard_sets import write_set
from tiny import TRAINER, extraction, inversion, joined, write

SETS = ("clean", "corrupted", "corrupted/contrast", "corrupted/contrast/3", "corrupted/pixelate/5")
CHECKPOINT = ("--ckpt_path", "run/inversion.ckpt")
SAMPLERS = {
    "pooled": {"steps": 2},  # as a score of the maps ends
    "free": {"steps": 2, "guidance_scale": 1.0, "control_scale": 0.0, "refine": {"interval": [0, 1]}},
}
BASELINES = ["regression", "ridge", "neighbour"]
SIZE = 16  # of the sets that are tested
FOOLED = [1.0, 0.0, float("nan")] * 5
Settings = dict[str, Any]


@pytest.fixture
def settings(shards: Path, classifier_folder: Path, prior_folder: Path) -> Settings:
    return inversion(classifier_folder, prior_folder, shards)


@pytest.fixture(scope="session")
def tested(tmp_path_factory: pytest.TempPathFactory, shards: Path, classifier_folder: Path, prior_folder: Path) -> Path:
    """A folder with `run/`, trained and tested in every way, and `left`: the digests of what was there then."""
    home = tmp_path_factory.mktemp("tested")
    with contextlib.chdir(home), pytest.MonkeyPatch.context() as patch:
        settings = inversion(classifier_folder, prior_folder, shards)
        main(["fit", "--config", write(Path("fit.yaml"), settings), "--trainer.limit_val_batches=1"])
        options(settings, judge=str(classifier_folder), num_samples=2, samplers=SAMPLERS, baselines=BASELINES)
        settings["data"]["init_args"]["test"] = write_sets(shards, home / "sets")
        main(["test", "--config", write(Path("test.yaml"), settings), *CHECKPOINT])
        Path("left").write_text(json.dumps(digests()))
        for module in ("metrics.weights", "evaluation.scorers"):  # fewer, for speed
            patch.setattr(f"featinv_pl.{module}.INCEPTION_FEATURES", 64)
        options(settings, inception=str(random_inception(Path("random.pth"), patch)))
        few = ["--data.batch_size=4", "--trainer.limit_val_batches=1"]
        main(["validate", "--config", write(Path("validate.yaml"), settings), *CHECKPOINT, *few])
    return home


def write_sets(shards: Path, folder: Path) -> dict[str, str]:
    """Small sets, also with labels of other classes, of one or some classes, without labels, and with an attack."""
    for name in ("clean", "corrupted/contrast/3", "corrupted/pixelate/5"):
        write_like(shards / name, folder / name, [None] * SIZE)
    clean = shards / "clean"
    predicted = int(ShardSet(clean, "", "")[0]["logits"].argmax())  # of every image
    chosen = [predicted, *(label for label in range(1, 4) if label != predicted)][:3]
    classes = {f"folder {label}": label for label in chosen} | {"unknown": -1}
    write_like(clean, folder / "single", [10])
    write_like(clean, folder / "foreign", [10, 11, 12, 13])
    write_like(clean, folder / "alike", [3] * 9, classes={"3": 3})
    write_like(clean, folder / "unlabelled", [-1] * 9)
    write_like(clean, folder / "hard/one", chosen * 5, FOOLED, classes=classes)
    names = ("clean", "corrupted", "single", "foreign", "alike", "unlabelled", "hard")
    return {name: str(folder / name) for name in names}


def write_like(
    original: Path, folder: Path, labels: Sequence[int | None], fooled: list[float] | None = None, **more: Any
) -> None:
    """Write the first samples of a set, under other labels if these are given."""
    samples = ShardSet(original, folder.name, "")
    given = [samples[index] | ({} if label is None else {"labels": label}) for index, label in enumerate(labels)]
    batch: Any = collate_samples(given) | ({} if fooled is None else {"fooled": torch.tensor(fooled)})
    manifest = write_set(folder, batch)
    settings: Any = {**manifest["settings"], **more}
    write_manifest(folder, {**manifest, "settings": settings, "provenance": samples.manifest["provenance"]})


def options(settings: Settings, **values: Any) -> None:
    settings["trainer"]["callbacks"][1]["init_args"].update(values)


def run_test(settings: Settings, *args: str) -> Settings:
    """Run `test`, and return what `metrics.json` holds."""
    main(["test", "--config", write(Path("test.yaml"), settings), *args])
    return document()


def document(folder: str | Path = "run") -> Settings:
    found: Settings = json.loads(Path(folder, "metrics.json").read_text())
    return found


def samples_of(test_set: str, root: Path = Path()) -> list[Settings]:
    rows: list[Settings] = parquet.read_table(root / f"run/samples/{test_set}.parquet").to_pylist()
    return rows


def digests() -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in Path("run").rglob("*.*")}


def test_every_method_has_its_scores(tested: Path) -> None:
    scores = joined(document(tested / "run"))
    names = (
        *("cosine", "cosine_median", "cosine_flat", "cosine_pooled", "cosine_q05", "judge_cosine"),
        *("agreement@1", "agreement@5", "overlap@5", "label@1", "psnr", "ssim"),
    )
    every = ("", ".ceiling", *(f".{name}" for name in (*BASELINES, *SAMPLERS)))
    for test_set in SETS:
        for name in names:
            assert {f"{test_set}/{name}{method}" for method in (*every, ".floor")} <= set(scores)
        for name in ("fd_test_resnet", "kd_test_resnet"):
            assert {f"{test_set}/{name}{method}" for method in every} <= set(scores)
            assert f"{test_set}/{name}.floor" not in scores
        for name in ("cosine", "psnr"):  # the same sampler under another name: the first sample is the same
            assert scores[f"{test_set}/{name}.pooled"] == pytest.approx(scores[f"{test_set}/{name}"], abs=1e-9)
        assert scores[f"{test_set}/cosine.free"] > scores[f"{test_set}/cosine"]
        assert {f"{test_set}/diversity_maps", f"{test_set}/judge_cosine.free"} <= set(scores)
    assert scores["clean/diversity_pixels"] > 0.01
    parts = [scores[f"corrupted/{name}/cosine"] for name in ("contrast/3", "pixelate/5")]
    assert scores["corrupted/cosine"] == pytest.approx(np.mean(parts), abs=1e-6)
    strips = {name: tested.joinpath(f"run/pictures/clean/first/{name}.png").read_bytes() for name in SAMPLERS}
    own = tested.joinpath("run/pictures/clean/first/reconstruction.png").read_bytes()
    assert strips["pooled"] == own != strips["free"]


def test_scores_follow_from_the_samples(tested: Path) -> None:
    found = document(tested / "run")
    scores, rows = joined(found), samples_of("clean", tested)
    assert len(rows) == found["samples"]["clean"] == SIZE
    assert sorted({row["key"] for row in rows}) == [row["key"] for row in rows]
    assert {"predicted.free", "diversity_maps"} <= rows[0].keys()
    for method in ("", ".ceiling", ".floor", ".neighbour"):
        agreed = [row["predicted.original"] == row[f"predicted{method}"] for row in rows]
        assert scores[f"clean/agreement@1{method}"] == pytest.approx(sum(agreed) / SIZE)
        assert scores[f"clean/cosine{method}"] == pytest.approx(sum(row[f"cosine{method}"] for row in rows) / SIZE)
        # The judge is the classifier, so it must agree with it.
        assert scores[f"clean/judge_cosine{method}"] == pytest.approx(scores[f"clean/cosine{method}"], abs=1e-3)
    both = samples_of("corrupted/contrast/3", tested) + samples_of("corrupted/pixelate/5", tested)
    assert scores["corrupted/psnr"] == pytest.approx(sum(row["psnr"] for row in both) / len(both))
    assert scores["corrupted/cosine_relative"] == pytest.approx(scores["corrupted/cosine"] / scores["clean/cosine"])
    for methods in found["scores"].values():
        for score in (score for method in methods.values() for score in method.values() if "low" in score):
            assert score["low"] - 1e-9 <= score["value"] <= score["high"] + 1e-9
    with tested.joinpath("run/scores.csv").open() as file:
        cells = {(row["test_set"], row["score"], row["method"]): row for row in csv.DictReader(file)}
    assert len(cells) == len(scores)
    cell = cells["clean", "cosine", "ceiling"]
    expected = found["scores"]["clean"]["ceiling"]["cosine"]
    assert {name: float(cell[name]) for name in ("value", "low", "high")} == expected


def test_scores_of_part_of_the_classes_the_images_and_an_attack(tested: Path) -> None:
    found = document(tested / "run")
    assert any("label@1 is taken over the 3 classes of the set" in note for note in found["notes"])
    scores, rows = joined(found), {row["key"]: row for row in samples_of("clean", tested)}
    hard, part = ShardSet(tested / "sets/hard/one", "", ""), samples_of("hard/one", tested)
    deceived = {hard[number]["key"] for number in range(0, 15, 3)}
    assert scores["hard/one/label@1_all"] == pytest.approx(np.mean([row["predicted"] == row["label"] for row in part]))
    assert scores["hard/label@1"] == scores["hard/one/label@1"]
    assert "clean/label@1_all" not in scores

    wrong = [row for row in part if row["predicted.original"] != row["label"]]
    for method in ("", ".floor"):
        kept = [row[f"predicted{method}"] == row["predicted.original"] for row in wrong]
        assert scores[f"hard/one/agreement@1_wrong{method}"] == pytest.approx(np.mean(kept))
        for name, group in (("wrong", wrong), ("fooled", [row for row in part if row["key"] in deceived])):
            hits = [row[f"predicted{method}"] == row["label"] for row in group]
            assert scores[f"hard/one/label@1_{name}{method}"] == pytest.approx(np.mean(hits))
    assert found["scores"]["hard/one"]["inversion"]["agreement@1_wrong"]["n"] == len(wrong) < len(part)
    assert scores["hard/attack_success.original"] == pytest.approx(5 / 10)
    assert not [name for name in scores if name.startswith("clean/") and ("fooled" in name or "attack" in name)]

    clean = np.mean([rows[row["key"]]["cosine"] for row in part])
    assert scores["hard/cosine_relative"] == pytest.approx(scores["hard/cosine"] / clean)
    assert scores["hard/cosine_relative"] != pytest.approx(scores["hard/cosine"] / scores["clean/cosine"], abs=1e-6)
    gain = np.mean([row["cosine"] - row["cosine.neighbour"] for row in part])
    assert scores["hard/cosine_difference.neighbour"] == pytest.approx(gain)


def test_notes_on_samples_and_labels(tested: Path) -> None:
    found = document(tested / "run")
    notes, scores = "\n".join(found["notes"]), joined(found)
    for fragment in (
        "single: 1 samples are too few for fd_test_resnet, which needs 2",
        "single: 1 samples are too few for kd_test_resnet",
        "foreign: 4 labels are not among the classifier's 10 classes",
        "foreign: 4 samples are too few for fd_test_resnet, which is biased upwards",  # they are of 8 features
        "no fid and kid: 'weights-inception",
        "no lpips: 'alexnet",
    ):
        assert fragment in notes
    assert not {"foreign/label@1", "unlabelled/label@1", "single/cosine.floor"} & set(scores)
    assert {"unlabelled/agreement@1", "unlabelled/cosine.floor", "single/cosine", "foreign/cosine"} <= set(scores)
    assert "alike: label@1" not in notes  # with one class there is nothing to choose
    assert scores["alike/label@1"] == np.mean([row["predicted"] == 3 for row in samples_of("alike", tested)])


@pytest.mark.parametrize(("folder", "command"), [("run", "test"), ("run/validate", "validate")])
def test_provenance_is_that_of_the_files(folder: str, command: str, tested: Path) -> None:
    provenance, sha = document(tested / folder)["provenance"], hashlib.sha256()
    checkpoint = torch.load(tested / "run/inversion.ckpt", weights_only=True)
    control = {name: value for name, value in checkpoint["state_dict"].items() if name.startswith("control.")}
    for name, value in sorted(control.items()):
        sha.update(f"{name.removeprefix('control.')} {tuple(value.shape)}".encode() + value.numpy().tobytes())
    assert provenance["checkpoint"] == {"path": "run/inversion.ckpt", "step": 2, "digest": sha.hexdigest()}
    assert provenance["command"] == command
    assert abs(datetime.now(UTC) - datetime.fromisoformat(provenance["date"])).days < 1
    assert provenance["model"] == json.loads(json.dumps(checkpoint["inversion"]))
    how = provenance["sampling"]
    assert (how["precision"], how["seed"], how["samplers"]["inversion"]["steps"]) == ("32-true", 0, 2)
    assert set(how["samplers"]) == {"inversion", *(SAMPLERS if command == "test" else ())}


def test_validate_leaves_what_test_wrote(tested: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tested)
    left, after = json.loads(Path("left").read_text()), digests()
    assert {name: after[name] for name in left} == left
    assert {Path(name).parts[1] for name in after.keys() - left} == {"validate", "validate.yaml"}
    scores = joined(document("run/validate"))
    assert {"val/cosine", "val/cosine.floor", "val/kid", "val/kid.ceiling"} <= set(scores)
    assert not [name for name in scores if any(one in name for one in ("free", "neighbour", "diversity", "fid.floor"))]


def page() -> str:
    return html.unescape(Path("report.html").read_text())


def test_a_report_shows_all_that_was_tested(tested: Path, capsys: Capture) -> None:
    unwanted = shutil.ignore_patterns("reconstructions", "single", "foreign", "alike", "unlabelled")
    shutil.copytree(tested / "run", "run", ignore=unwanted)
    main(["report", "."])
    assert joined(json.loads(Path("metrics.json").read_text())["run"]) == joined(document())
    shown = Path("report.html").read_text()
    # Original, autoencoder and reconstruction of 3 images of each of four test sets, and of 3 extremes of each of three
    # groups; cosine and agreement of two corruptions, and a histogram of each group.
    assert shown.count("data:image/png;base64,") == 3 * (3 * 4 + 3 * 3)
    assert shown.count("data:image/svg+xml;base64,") == 2 * 2 + 3
    for method in ("run", "autoencoder", *BASELINES, "floor"):
        assert f'<td data-head="method">{method}</td>' in shown
    assert not re.search(r'(src|href)="(?!data:|#)', shown)  # it needs nothing else
    assert '<th scope="col">agreement@1 wrong</th>' in shown
    assert re.findall(r'scope="rowgroup">(\w+), \d+ images', shown)[:3] == ["clean", "corrupted", "hard"]
    found = joined(document())
    assert f"a cosine of {found['clean/cosine']:.3f} [" in page()
    assert f"another image {found['clean/cosine.floor']:.3f})" in page()
    made_by = document()["provenance"]
    for fact in (
        f"step 2 of <code>run/inversion.ckpt</code> (weights {made_by['checkpoint']['digest'][:8]}), spatial",
        f"{made_by['networks']['classifier']} (weights {made_by['model']['backbone'][:8]}), layer forward_features",
        f"{made_by['networks']['prior']} (weights {made_by['model']['unet'][:8]})",
        f"featinv-pl {made_by['code']['version']}",
        f"torch {version('torch')}",
        made_by["date"],
        "0, 32-true",
    ):
        assert fact in page()
    facts = json.loads(Path("run/pictures/hard/one/first/tiles.json").read_text())
    folders = {f"{row['label']} folder {row['label']}" for row in samples_of("hard/one", tested)}
    assert set(facts["label"]) == folders
    captions = re.findall(r"<figcaption>(original: [^<]*)", page())
    assert f"original: class {facts['prediction'][1]}\nlabel {facts['label'][1]}" in captions  # which differ

    shutil.copytree("run", "same")
    state = torch.load("run/inversion.ckpt", weights_only=True)
    next(iter(state["state_dict"].values())).add_(1)
    torch.save({**state, "global_step": 7}, "run/inversion.ckpt")  # as another training leaves it
    main(["report", "."])
    assert re.search(r"16 images</th>.*\s*<tr><td [^>]*>(run|same) - (run|same)</td><td [^>]*>0.000 ", page())
    [notes] = re.findall(r'id="notes">.*?</ul>', page(), re.DOTALL)
    assert notes.count("no fid and kid") == notes.count("no lpips") == 1  # though both have it
    assert "has changed since: it holds step 7 now. Test again." in page()

    def refused(path: str, changed: Settings, fragment: str) -> None:
        before = Path(path).read_text()
        Path(path).write_text(json.dumps({**json.loads(before), **changed}))
        with pytest.raises(SystemExit):
            main(["report", "."])
        assert fragment in capsys.readouterr().err
        Path(path).write_text(before)

    tiles, scored = "run/pictures/clean/first/tiles.json", document()
    refused(tiles, {"checkpoint": "0" * 64}, "are of other weights (00000000) than the scores in")
    refused("run/metrics.json", {"samples": {"other": 16}}, "no test set has scores and pictures of every inverter")
    validated = {**scored["provenance"], "command": "validate"}
    refused("run/metrics.json", {"provenance": validated}, "are those of `validate`, and a report shows")


def test_an_interrupted_test_resumes_otherwise(tested: Path, settings: Settings, classifier_folder: Path) -> None:
    shutil.copytree(tested / "run", "run")
    fitted = {path: path.stat().st_mtime_ns for path in Path("run").glob("r*.safetensors")}
    removed: set[str] = set()
    # Half of what is stored of each test set, by time, since files are named by digests.
    for path in sorted(Path("run/reconstructions").iterdir(), key=lambda path: path.stat().st_mtime_ns)[::2]:
        removed |= load_file(path).keys()
        path.unlink()
    left = {path.name for path in Path("run/reconstructions").iterdir()}
    Path("run/reconstructions/damaged.safetensors").write_bytes(b"no")
    for file in ("metrics.json", "scores.csv", "samples/clean.parquet"):
        Path("run", file).unlink()
    options(settings, judge=str(classifier_folder), num_samples=2, samplers=SAMPLERS, baselines=BASELINES)
    settings["data"]["init_args"]["test"] = {"clean": str(tested / "sets/clean")}
    processes = ("--data.batch_size=7", "--trainer.devices=2", "--trainer.strategy=ddp_fork")
    scores = joined(run_test(settings, *CHECKPOINT, *processes))
    expected = joined(document(tested / "run"))
    # Equal except for the rounding of float32 in batches of other sizes.
    assert scores == pytest.approx({name: expected[name] for name in scores}, abs=1e-4, rel=1e-4)
    for row, same in zip(samples_of("clean"), samples_of("clean", tested), strict=True):
        assert row == pytest.approx(same, abs=1e-4)
    new = [path for path in Path("run/reconstructions").iterdir() if path.name not in {*left, "damaged.safetensors"}]
    made = [name for path in new for name in load_file(path)]
    assert len(set(made)) == len(made) > 0
    assert set(made) <= removed  # what was stored has been reused
    assert {path: path.stat().st_mtime_ns for path in fitted} == fitted
    assert {path.stem for path in fitted} == {"regression", "ridge"}


def test_a_dry_run_estimates_and_writes_nothing(settings: Settings, capsys: Capture) -> None:
    config = write(Path("inversion.yaml"), settings)
    before = sorted(Path().rglob("*"))
    main(["test", "--config", config, "--plan"])
    printed = capsys.readouterr().out
    assert re.search(r"^corrupted/pixelate/5 +60 +\S+$", printed, re.MULTILINE)
    assert re.search(r"^all +180 +\S+$", printed, re.MULTILINE)
    assert "From 2 batches at" in printed
    assert sorted(Path().rglob("*")) == before
    with pytest.raises(SystemExit):
        main(["fit", "--config", config, "--plan"])
    assert "--dry_run: only test with an Evaluation" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samplers": {"a/b": Sampler()}}, "`samplers`: 'a/b' cannot be part of a score's name"),
        ({"samplers": {"reconstruction": Sampler()}}, "`samplers`: 'reconstruction' is the name of another method"),
        ({"judge": "nothing"}, "`judge`: 'nothing' is neither a folder nor a timm model"),
    ],
)
def test_bad_arguments_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Evaluation(**arguments)


def test_a_backbone_without_classes_is_scored_by_its_maps(classifier_folder: Path, prior_folder: Path) -> None:
    headless = timm.create_model(f"local-dir:{classifier_folder}", pretrained=True, num_classes=0)
    save_for_hf(headless, "headless", safe_serialization=True)
    extract = write(Path("extract.yaml"), extraction(Path("headless"), prior_folder, ["clean"]))
    main(["predict", "--config", extract, "--trainer.limit_predict_batches=1"])
    settings = inversion(Path("headless"), prior_folder)
    settings["data"]["init_args"] |= {"train": None, "val": None, "test": {"clean": "shards/clean"}}
    options(settings, judge="headless")
    found = run_test(settings)
    assert {"cosine", "cosine_pooled", "psnr", "judge_cosine"} <= found["scores"]["clean"]["inversion"].keys()
    assert not [name for name in joined(found) if "agreement" in name or "overlap" in name or "label" in name]
    assert [note for note in found["notes"] if "has no classes" in note]
    main(["report", "."])
    assert '<td data-head="method">autoencoder</td>' in Path("report.html").read_text()


def test_what_cannot_be_scored_stops_no_rest(settings: Settings, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("empty", "lossy"):
        shutil.copytree(shards / "clean", name)
    manifest = read_manifest(Path("empty"), "")
    write_manifest(Path("empty"), {**manifest, "shards": [], "samples": 0})
    write_manifest(Path("lossy"), {**manifest, "settings": {**manifest["settings"], "image_format": "jpg"}})
    settings["data"]["init_args"] |= {"train": None, "test": {"a/b": "lossy", "empty": "empty"}}
    settings["data"]["init_args"]["neighbours"] = str(shards / "clean")
    reconstruct = Inverter.reconstruct_from

    def failing(self: Inverter, features: Tensor, noise: Tensor, *others: Any) -> Tensor:
        images = reconstruct(self, features, noise, *others)
        images[0, 0, 0, 0] = torch.nan
        return images

    monkeypatch.setattr(Inverter, "reconstruct_from", failing)
    found = run_test(settings)
    assert found["samples"] == {"a/b": 56, "a": 56}  # the first of each batch of 16 is left out
    assert 0 < joined(found)["a/b/cosine"] <= 1
    assert joined(found)["a/b/cosine.neighbour"] == pytest.approx(1)  # found without training shards: itself
    missing = ("empty: left out", "a/b: left out 4 samples with NaN", "no regression", "no scores relative to 'clean'")
    for fragment in (*missing, "a/b: the originals are stored as JPEGs"):
        assert any(fragment in note for note in found["notes"])


def test_the_scores_of_one_set_are_freed_before_the_next(
    settings: Settings, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They hold hundreds of MB, and refer to themselves."""
    opened, alive = Scores._opened, []

    def counting(self: Scores, test_set: str) -> Any:
        alive.append(sum(isinstance(one, Distance) for one in gc.get_objects()))
        return opened(self, test_set)

    monkeypatch.setattr(Scores, "_opened", counting)
    settings["data"]["init_args"]["test"] = {name: str(shards / "clean") for name in ("one", "two", "three")}
    options(settings, baselines=[])
    gc.collect()
    gc.disable()  # by itself it runs too late
    try:
        run_test(settings, "--trainer.limit_test_batches=1")
    finally:
        gc.enable()
    assert len(alive) == 3
    assert len({*alive}) == 1


def test_scores_reach_the_caller(shards: Path, classifier_folder: Path, prior_folder: Path, capsys: Capture) -> None:
    trainer = Trainer(**TRAINER, default_root_dir="run", callbacks=[Evaluation(baselines=())])
    module = FeatureInversion(str(classifier_folder), str(prior_folder), 32, sampler=Sampler(steps=2))
    [returned] = trainer.test(module, datamodule=FeatureShards(test={"clean": shards / "clean"}))
    assert returned == pytest.approx(joined(document()), rel=1e-6)
    assert {name: value.item() for name, value in trainer.callback_metrics.items()} == returned
    assert "Test metric" not in capsys.readouterr().out  # a line for each of them


# Errors of the classifier, with tables in place of those of `test`, so that the shares are known


def rewrite_samples(test_set: str, seen: list[int], drawn: list[int], neighbours: list[int]) -> None:
    """Replace what classifiers say of a test set: of originals, drawings and neighbours, alike by both."""
    path = Path(f"run/samples/{test_set}.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = samples_of("clean") if not path.exists() else samples_of(test_set)
    given = {"predicted.original": seen, "predicted": drawn, "predicted.neighbour": neighbours}
    columns = {name: [row[name] for row in rows] for name in ("key", "label")} | given
    columns |= {"judge_predicted": drawn, "judge_predicted.original": [row["label"] for row in rows]}
    parquet.write_table(pyarrow.table(columns), path)


@pytest.fixture
def attacked(tested: Path) -> list[int]:
    """A copy of the run with an adversarial set beside `clean`; the labels of both."""
    shutil.copytree(tested / "run", "run")
    write_like(tested / "sets/clean", Path("adversarial"), [None] * SIZE)
    manifest = read_manifest(Path("adversarial"), "")
    made_by: Any = {**manifest["provenance"], "attack": "Attack(epsilon=16, step=1.0, steps=2)"}
    write_manifest(Path("adversarial"), {**manifest, "provenance": made_by})
    settings = yaml.safe_load(Path("run/test.yaml").read_text())
    settings["data"]["init_args"]["test"] = {"clean": str(tested / "sets/clean"), "adversarial": "adversarial"}
    Path("run/test.yaml").write_text(yaml.safe_dump(settings))
    found = document()
    found["samples"]["adversarial"] = SIZE
    Path("run/metrics.json").write_text(json.dumps(found))
    labels = [row["label"] for row in samples_of("clean")]
    wrong = [(label + 1) % 10 for label in labels]
    drawn = [wrong[0], *labels[1:]]  # the first is an error that the drawing keeps; all others are right
    rewrite_samples("clean", drawn, drawn, labels)
    # Fourteen of the fifteen that were right are fooled; nine drawings and three neighbours show the wrong class.
    rewrite_samples("adversarial", [*wrong[:15], labels[15]], wrong[:10] + labels[10:], wrong[:4] + labels[4:])
    return labels


def test_errors_are_shown_beside_their_control(attacked: list[int], capsys: Capture) -> None:
    stored = sorted(path.name for path in Path("run/reconstructions").iterdir())
    main(["errors", "run", "--out", "out", "--num_images", "3"])
    assert sorted(path.name for path in Path("run/reconstructions").iterdir()) == stored  # nothing is drawn again
    assert "Adversarial: 0.643 [" in capsys.readouterr().out
    facts = json.loads(Path("out/errors.json").read_text())
    shares, minus = facts["kinds"]["adversarial"]["shares"], facts["kinds"]["adversarial"]["minus"]
    for name in ("inversion", "held-out"):
        assert shares[name]["value"] == pytest.approx(9 / 14)
        assert (shares[name]["low"], shares[name]["high"]) == pytest.approx(wilson(9 / 14, 14))
    assert shares["held-out original"]["value"] == shares["control"]["value"] == 0
    assert shares["inversion right"] == pytest.approx({"value": 1, "low": 0.2065, "high": 1, "n": 1}, abs=1e-4)
    assert facts["kinds"]["adversarial"]["difference"]["value"] == pytest.approx(9 / 14)
    assert minus["neighbour"]["value"] == pytest.approx(6 / 14)
    kept = {row[1]: (int(row[2]), row[3]) for row in facts["confusions"][1:] if row[0] == "adversarial"}
    for label in set(attacked):
        rows = [row for row in range(1, 15) if attacked[row] == label]
        if name := f"{label} → {(label + 1) % 10}" if rows else "":
            count, share = kept[name]
            assert count == len(rows)
            assert share.startswith(f"{np.mean([row < 10 for row in rows]):.3f}")
    assert facts["test_sets"][-1][1] == "adversarial (epsilon 16)"
    own = facts["kinds"]["misclassified"]["shares"]
    alike = [row for row in range(1, SIZE) if attacked[row] == attacked[0]]
    assert own["inversion"]["value"] == 1
    assert not alike or own["control"]["value"] == 0
    for name, count in (("misclassified", 1), ("adversarial", 3)):
        gallery = [one["wrong_class"] for one in facts["gallery"][name]]
        assert gallery == sorted(gallery, reverse=True)
        assert len(gallery) == count
    assert [note.split(":")[0] for note in facts["notes"]] == ["There are no corrupted images"]
    shown = Path("out/errors.html").read_text()
    assert shown.count("data:image/png;base64,") == 4 * 1 + 6 * 3
    assert not re.search(r'(src|href)="(?!data:|#)', shown)


def test_runs_whose_errors_cannot_be_shown_are_refused(attacked: list[int], capsys: Capture) -> None:
    def refused(fragment: str, run: str = "run") -> None:
        with pytest.raises(SystemExit):
            main(["errors", run, "--out", "out"])
        assert fragment in capsys.readouterr().err
        assert not Path("out").exists()

    refused("are those of `validate`. Run `featinv-pl test`", "run/validate")
    rewrite_samples("clean", attacked, attacked, attacked)
    rewrite_samples("adversarial", attacked, attacked, attacked)
    refused("there is no error to show among the images of adversarial, clean")
    state = torch.load("run/inversion.ckpt", weights_only=True)
    next(value for name, value in state["state_dict"].items() if name.startswith("control.")).add_(1)
    torch.save(state, "run/inversion.ckpt")
    refused("'run/inversion.ckpt' has changed since 'run' was tested")
    Path("run/metrics.json").unlink()
    refused("'run' has not been tested: there is no metrics.json. Run `featinv-pl test --config run/fit.yaml")
