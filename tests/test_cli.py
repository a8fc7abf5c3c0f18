"""The public command, from images to scores, on tiny networks; and what it says when something is wrong."""

import contextlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from featinv_pl.__main__ import main
from featinv_pl.data.manifests import read_manifest, write_manifest

TRAINER: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


def write(path: Path, settings: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def extraction(classifier: Path, prior: Path, sources: list[str]) -> dict[str, Any]:
    return {
        "trainer": {
            **TRAINER,
            "default_root_dir": "shards",
            "callbacks": [{"class_path": "ShardWriter", "init_args": {"folder": "shards", "shard_size": 30}}],
            "limit_predict_batches": 2,
        },
        "model": {
            "class_path": "FeatureExtraction",
            "init_args": {"backbone": str(classifier), "autoencoder": str(prior / "vae"), "image_size": 32},
        },
        "data": {"class_path": "DigitsData", "init_args": {"sources": sources, "batch_size": 30}},
    }


def inversion(classifier: Path, prior: Path, shards: Path = Path("shards")) -> dict[str, Any]:
    def scored(metric: str, key: str, **more: Any) -> dict[str, Any]:
        init_args = more.pop("init_args", {})
        settings = {"metric": {"class_path": metric, "init_args": init_args}, "key": key, **more}
        return {"class_path": "PerSource", "init_args": settings}

    return {
        "seed_everything": 0,
        "trainer": {
            **TRAINER,
            "default_root_dir": "run",
            "max_steps": 2,
            "val_check_interval": 2,
            "callbacks": [
                {"class_path": "ModelCheckpoint", "init_args": {"dirpath": "run", "filename": "inversion"}},
                scored("MapSimilarity", "features"),
                scored("Agreement", "logits"),
                scored("LabelAccuracy", "logits", target="labels"),
                scored("FrechetDistance", "features", init_args={"num_features": 8, "extractor": "tiny"}),
                {"class_path": "ReconstructionGrid", "init_args": {"num_images": 3}},
                {"class_path": "ScoreFile"},
            ],
        },
        "model": {
            "class_path": "FeatureInversion",
            "init_args": {
                "backbone": str(classifier),
                "prior": str(prior),
                "image_size": 32,
                "hidden_channels": 8,
                "sampler": {"steps": 2},
            },
        },
        "data": {
            "class_path": "FeatureShards",
            "init_args": {
                "train": str(shards / "train"),
                "val": str(shards / "val"),
                "test": {"clean": str(shards / "clean"), "corrupted": str(shards / "corrupted")},
                "batch_size": 16,
            },
        },
    }


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
    main(["validate", "--config", config, "--ckpt_path", "run/inversion.ckpt"])
    assert set(json.loads(Path("run/scores.json").read_text())) >= {"val/cosine", "val/cosine_floor"}

    main(["test", "--config", config, "--ckpt_path", "run/inversion.ckpt"])
    scores = json.loads(Path("run/scores.json").read_text())
    names = (
        *("cosine", "cosine_median", "cosine_flat", "cosine_pooled", "cosine_q05"),
        *("agreement@1", "agreement@5", "overlap@5", "label@1", "fd_tiny"),
    )
    for source in ("clean", "corrupted", "corrupted/contrast", "corrupted/contrast/3", "corrupted/pixelate/5"):
        for name in names:
            assert {f"{source}/{name}{arm}" for arm in ("", "_floor", "_ceiling")} <= set(scores)
        floor, ceiling = scores[f"{source}/cosine_floor"], scores[f"{source}/cosine_ceiling"]
        calibrated = (scores[f"{source}/cosine"] - floor) / (ceiling - floor)
        assert scores[f"{source}/cosine_calibrated"] == pytest.approx(calibrated, abs=1e-4)
    assert scores["corrupted/cosine"] == pytest.approx(
        (scores["corrupted/contrast/3/cosine"] + scores["corrupted/pixelate/5/cosine"]) / 2, abs=1e-6
    )
    for row in ("original", "autoencoder", "reconstruction"):
        assert Path(f"run/pictures/corrupted/contrast/3/{row}.png").is_file()
    for stage in ("fit", "validate", "test"):
        assert yaml.safe_load(Path(f"run/{stage}.yaml").read_text())["model"]["class_path"].endswith("FeatureInversion")

    main(["report", "."])
    assert json.loads(Path("metrics.json").read_text()) == {"run": scores}
    page = Path("report.html").read_text()
    assert page.count("data:image/png;base64,") == 1 + 3 * 3  # the plot, and three rows for each of three sources
    assert "http" not in page.replace("http://www.w3.org", "")


def test_scores_do_not_depend_on_the_batch_size(shards: Path, classifier_folder: Path, prior_folder: Path) -> None:
    config = write(Path("inversion.yaml"), inversion(classifier_folder, prior_folder, shards))
    results = []
    for size in ("7", "60"):
        main(["validate", "--config", config, "--data.batch_size", size])
        results.append(json.loads(Path("run/scores.json").read_text()))
    assert results[0] == pytest.approx(results[1], abs=2e-3)


def test_two_processes_score_as_one(shards: Path, classifier_folder: Path, prior_folder: Path) -> None:
    config = write(Path("inversion.yaml"), inversion(classifier_folder, prior_folder, shards))
    main(["validate", "--config", config])
    alone = json.loads(Path("run/scores.json").read_text())
    two = ["--trainer.devices=2", "--trainer.strategy=ddp_fork"]
    main(["validate", "--config", config, *two])
    together = json.loads(Path("run/scores.json").read_text())
    # The floor pairs each image with the one before it on the same process.
    same = {name for name in alone if "floor" not in name and "calibrated" not in name}
    assert {name: together[name] for name in same} == pytest.approx({name: alone[name] for name in same}, abs=2e-3)


def test_short_names_overrides_and_print_config(
    capsys: pytest.CaptureFixture[str], classifier_folder: Path, prior_folder: Path
) -> None:
    config = write(Path("inversion.yaml"), inversion(classifier_folder, prior_folder))
    with pytest.raises(SystemExit) as stop:
        main(["fit", "-c", config, "--model.dropout=0.5", "--data.test.hard=here", "--print_config"])
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["init_args"]["dropout"] == 0.5
    assert printed["data"]["init_args"]["test"]["hard"] == "here"


def test_base_lies_beneath(capsys: pytest.CaptureFixture[str]) -> None:
    Path("below").mkdir()
    write(Path("root.yaml"), {"trainer": {"max_steps": 1, "precision": 32, "callbacks": [{"class_path": "ScoreFile"}]}})
    write(Path("below/middle.yaml"), {"base": "../root.yaml", "trainer": {"max_steps": 2}})
    top = {"base": "below/middle.yaml", "trainer": {"callbacks+": [{"class_path": "ReconstructionGrid"}]}}
    config = write(Path("top.yaml"), {**top, "model": {"class_path": "Classifier", "init_args": CLASSIFIER}})
    with pytest.raises(SystemExit):
        main(["fit", "--config", config, "--print_config"])
    trainer = yaml.safe_load(capsys.readouterr().out)["trainer"]
    assert (trainer["max_steps"], trainer["precision"]) == (2, 32)
    names = [callback["class_path"].split(".")[-1] for callback in trainer["callbacks"]]
    assert names == ["ScoreFile", "ReconstructionGrid"]


CLASSIFIER: dict[str, Any] = {"model": "test_resnet", "num_classes": 10, "image_size": 32}


@pytest.mark.parametrize("command", [["--help"], ["fit", "--help"], ["demo", "--help"], ["verify", "--help"], []])
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):
        main(command)
    assert "usage: " in capsys.readouterr().out


def test_version_needs_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys; from featinv_pl.__main__ import main; main(['--version']); assert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", result.stdout)


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
        ("--model.prior=nowhere", ["--model.prior: 'nowhere' is no folder, no file, and could not be fetched"]),
        ("--model.backbone=resnett50", ["'resnett50' is neither a folder nor a timm model", "Did you mean resnet50"]),
        ("--ckpt_path=nowhere.ckpt", ["--ckpt_path: there is no file 'nowhere.ckpt'"]),
        ("--model.dropuot=0.1", ["dropuot"]),
        ("--model.dropout=lots", ["dropout"]),
        ("--data.batch_size=100000", ["--data.batch_size: a batch of 100000"]),
        ("--model.sampler.steps=0", ["--model.sampler.steps must be at least 1"]),
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
    refused(["fit", "--config", "top.yaml"], capsys, "base: there is no file")


def test_shards_of_another_backbone_are_refused(
    shards: Path, classifier_folder: Path, prior_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from featinv_pl.pretraining import Classifier

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
    refused([*args, "--model.conditioning=pooled"], capsys, "conditioning: spatial in the checkpoint, pooled here")
    refused([*args, "--model.hidden_channels=4"], capsys, "hidden_channels: 8 in the checkpoint, 4 here")
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.6"}, "foreign.ckpt")
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


def test_every_command_runs_as_a_module() -> None:
    import subprocess
    import sys

    result = subprocess.run([sys.executable, "-m", "featinv_pl", "demo"], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == (
        "featinv-pl: error: demo: there is no folder 'experiments/digits' here. Run it from the project's folder.\n"
    )
