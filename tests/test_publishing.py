"""A trained run becomes a folder that anyone can load, and pictures come out of it."""

import contextlib
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from featinv_pl.__main__ import main
from featinv_pl.errors import UserError
from featinv_pl.inverter.pipeline import FeatInvPipeline
from featinv_pl.nets.control import Encoder
from featinv_pl.nets.frozen import digest
from featinv_pl.nets.hub import SUMS
from featinv_pl.tasks.inversion import Adapt, FeatureInversion
from featinv_pl.types import to_uint8

ROOT = Path(__file__).parents[1]
DIGITS, DEBUG = str(ROOT / "experiments/digits"), str(ROOT / "experiments/debug.yaml")


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, classifier_folder: Path, prior_folder: Path) -> Path:
    """A run of `fit` and `test`, as the demo's."""
    home = tmp_path_factory.mktemp("run")
    frozen = ["--model.backbone", str(classifier_folder)]
    callbacks = [
        {"class_path": "Evaluation"},
        {"class_path": "ModelCheckpoint", "init_args": {"dirpath": "runs/demo/spatial", "filename": "inversion"}},
    ]
    with contextlib.chdir(home):
        Path("callbacks.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
        extract = ["--config", f"{DIGITS}/extract.yaml", "--config", DEBUG, "--data.sources", "[train,val,clean]"]
        main(["predict", *extract, *frozen, "--model.autoencoder", str(prior_folder / "vae")])
        config = ["--config", f"{DIGITS}/spatial.yaml", "--config", DEBUG, "--config", "callbacks.yaml", *frozen]
        config += [
            "--model.prior",
            str(prior_folder),
            "--model.encoder.hidden_channels=8",
            "--model.encoder.num_layers=2",
        ]
        config += ["--data.test", "{clean: runs/demo/shards/clean}"]
        main(["fit", *config])
        main(["test", *config, "--ckpt_path", "runs/demo/spatial/inversion.ckpt"])
    return home / "runs/demo/spatial"


@pytest.fixture(scope="session")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "model"
    main(["export", str(run), str(folder)])
    return folder


@pytest.fixture
def model(exported: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(exported, tmp_path / "model"))


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    """Of other sizes and modes than the classifier wants, two with the same stem."""
    paths = [tmp_path / "a" / "noise.png", tmp_path / "b" / "noise.png", tmp_path / "grey.jpg"]
    for number, path in enumerate(paths):
        path.parent.mkdir(exist_ok=True)
        picture = Image.effect_noise((40 + 10 * number, 50), 60)
        (picture if path.suffix == ".jpg" else picture.convert("RGBA")).save(path)
    return [str(path) for path in paths]


def refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("featinv-pl: error: ")
    return message


# Export


def test_exported_model_draws_what_the_run_draws(run: Path, exported: Path) -> None:
    pipeline = FeatInvPipeline.from_pretrained(exported)
    state = torch.load(run / "inversion.ckpt", weights_only=True)["state_dict"]
    ours = {f"control.{name}": value for name, value in pipeline.inverter.control.state_dict().items()}
    assert ours.keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in ours.items())
    assert pipeline.inverter.sampler.steps == 10
    assert pipeline.inverter.image_size == 32


def test_folder_is_whole_safe_and_says_what_it_is(exported: Path, classifier_folder: Path) -> None:
    names = {path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file()}
    weights = "diffusion_pytorch_model.safetensors"
    assert {f"encoder/{weights}", f"controlnet/{weights}", "model_index.json", "README.md"} <= names
    assert {"backbone/model.safetensors", f"prior/unet/{weights}", "prior/prompts.safetensors"} <= names
    assert {Path(name).suffix for name in names} == {".safetensors", ".json", ".md", ""}
    card = (exported / "README.md").read_text()
    scores = json.loads((exported / "model_index.json").read_text())
    assert scores["backbone"] == "test_resnet"
    for words in ("`test_resnet` at 32 pixels", "a map of 8x4x4", "Steps | 2", "lr 0.005", "| clean |", "0.15"):
        assert words in card
    assert "Min-SNR weights, cut at | 5.0" in card
    assert "| source | cosine | agreement@1 | agreement@5 |\n" in card
    assert "* no fid and kid: 'weights-inception" in card
    assert str(classifier_folder) not in card + json.dumps(scores)


def test_three_lines_of_python(exported: Path, pictures: list[str]) -> None:
    pipeline = FeatInvPipeline.from_pretrained(str(exported))
    drawn = pipeline([Image.open(path) for path in pictures], num_samples=2)
    assert [len(samples) for samples in drawn] == [2, 2, 2]
    assert drawn[0][0].size == (32, 32)
    [alone] = pipeline(Image.open(pictures[1]), num_samples=1)
    # Neither batch nor number of samples matters, but for rounding: sums are ordered differently in other batches.
    assert np.abs(np.asarray(alone[0], int) - np.asarray(drawn[1][0], int)).max() <= 1
    assert np.abs(np.asarray(drawn[0][0], int) - np.asarray(drawn[0][1], int)).max() > 1
    features = pipeline.classify(pipeline.crop([Image.open(pictures[1])]))["features"]
    [[from_map]] = pipeline(features)
    assert from_map.tobytes() == alone[0].tobytes()


def test_sampler_can_be_changed(exported: Path) -> None:
    pipeline = FeatInvPipeline.from_pretrained(exported)
    features = torch.randn(pipeline.inverter.classifier.feature_shape)
    before = pipeline.reconstruct(features)
    assert not torch.equal(before, pipeline.with_sampler(steps=3, guidance_scale=2.0).reconstruct(features))
    assert torch.equal(before, FeatInvPipeline.from_pretrained(exported).reconstruct(features))
    assert not torch.equal(before, FeatInvPipeline.from_pretrained(exported).reconstruct(features, seed=1))
    with pytest.raises(UserError, match=r"The map has the shape \(3, 4, 4\); this inverter reads \(8, 4, 4\)"):
        pipeline.reconstruct(torch.zeros(3, 4, 4))


def test_training_can_start_from_a_published_control(run: Path, exported: Path) -> None:
    settings = yaml.safe_load((run / "fit.yaml").read_text())["model"]["init_args"]
    inverter = FeatInvPipeline.from_pretrained(exported).inverter
    options = {name: settings[name] for name in ("backbone", "prior", "image_size")}
    again = FeatureInversion(**options, encoder=Encoder(**settings["encoder"]), adapt=Adapt(exported)).inverter
    for name, value in again.state_dict().items():
        assert torch.equal(value, inverter.state_dict()[name])


def test_scores_of_other_weights_are_left_out(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = Path(shutil.copytree(run, Path("other run").absolute()))
    state = torch.load(home / "inversion.ckpt", weights_only=True)
    next(iter(state["state_dict"].values())).add_(1)
    torch.save({**state, "global_step": 9}, home / "inversion.ckpt")
    main(["export", str(home), "out"])
    assert "Steps | 9" in (card := Path("out/README.md").read_text())
    assert "None were measured with these weights." in card
    [line] = [line for line in capsys.readouterr().out.splitlines() if "no scores" in line]
    assert "other run' has the scores of other weights (step 2, " in line
    [command] = re.findall("`featinv-pl (.*)` and export again", line)
    # The very command is run, but on fewer samples.
    with contextlib.chdir(run.parents[2]):
        main([*shlex.split(command), "--trainer.limit_test_batches=1"])
    main(["export", str(home), "again"])
    scores = json.loads((home / "metrics.json").read_text())["scores"]
    assert f"| clean | {scores['clean']['inversion']['cosine']['value']:.4f} |" in Path("again/README.md").read_text()
    assert "no scores" not in capsys.readouterr().out


def test_a_classifier_with_random_weights_is_exported(
    run: Path, prior_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frozen = ["--model.backbone=test_resnet", "--model.weights=random", "--model.prior", str(prior_folder)]
    with contextlib.chdir(run.parents[2]):
        extract = ["--config", f"{DIGITS}/extract.yaml", "--config", DEBUG, "--data.sources", "[train]"]
        extract += ["--model.autoencoder", str(prior_folder / "vae"), "--trainer.callbacks.folder=random"]
        main(["predict", *extract, *frozen[:2], "--trainer.default_root_dir=random"])
        config = ["--config", f"{DIGITS}/spatial.yaml", "--config", DEBUG, "--config", "callbacks.yaml", *frozen]
        config += [
            "--model.encoder.hidden_channels=8",
            "--data.train=random/train",
            "--data.val=null",
            "--data.test={}",
        ]
        config += ["--trainer.default_root_dir=random/run", "--trainer.callbacks.dirpath=random/run"]
        main(["fit", *config])
        torch.rand(5)  # a state of its own
        main(["export", "random/run", "random/model"])
        classifier = FeatInvPipeline.from_pretrained("random/model").inverter.classifier
        state = torch.load("random/run/inversion.ckpt", weights_only=True)
    assert digest(classifier.model) == state["inversion"]["backbone"]


def test_export_of_several_checkpoints_wants_one(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = Path(shutil.copytree(run, "twice"))
    shutil.copy(home / "inversion.ckpt", home / "last.ckpt")
    message = refused(["export", "twice", "out"], capsys)
    assert "RUN: 'twice' holds 2 checkpoints: twice/inversion.ckpt, twice/last.ckpt. Give the one" in message
    assert not Path("out").exists()
    main(["export", "twice/last.ckpt", "out"])
    assert (Path("out") / "model_index.json").is_file()
    assert "OUT: 'out' exists, and is left as it is" in refused(["export", "twice/last.ckpt", "out"], capsys)


@pytest.mark.parametrize("fault", ["nothing", "no configuration", "no inverter", "truncated", "half"])
def test_refuses_a_run(fault: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = Path(shutil.copytree(run, "broken"))
    checkpoint, configuration = home / "inversion.ckpt", home / "fit.yaml"
    if fault == "nothing":
        shutil.rmtree(home)
        message = "RUN: 'broken' holds 0 checkpoints"
    elif fault == "no configuration":
        configuration.unlink()
        message = "RUN: no fit.yaml beside or above 'broken/inversion.ckpt'"
    elif fault == "no inverter":
        settings = yaml.safe_load(configuration.read_text())
        settings["model"] = {"class_path": "featinv_pl.tasks.pretraining.Classifier", "init_args": {}}
        configuration.write_text(yaml.safe_dump(settings))
        message = "RUN: 'broken/fit.yaml' does not configure a FeatureInversion"
    elif fault == "truncated":
        checkpoint.write_bytes(checkpoint.read_bytes()[:5000])
        message = "RUN: 'broken/inversion.ckpt' is damaged"
    else:
        state = torch.load(checkpoint, weights_only=True)
        del state["state_dict"]["control.encoder.layers.0.bias"]
        torch.save(state, checkpoint)
        message = "encoder.layers.0.bias"
    assert message in refused(["export", "broken", "out"], capsys)
    assert not list(Path().glob("out*"))


# Reconstruct


def test_reconstruct_writes_pictures_and_a_sheet(
    exported: Path, pictures: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["reconstruct", "--model", str(exported), *pictures, "--num_samples", "2", "--seed", "3", "--out"]
    main([*command, "out"])
    names = {f"{stem}-{number}.png" for stem in ("0-noise", "1-noise", "grey") for number in range(2)}
    assert {path.name for path in Path("out").iterdir()} == names | {"contact_sheet.png", "reconstructions.json"}
    assert "6 reconstructions of 3 pictures" in capsys.readouterr().out
    sheet = Image.open("out/contact_sheet.png")
    assert sheet.width == 5 * 192 + 4 * 4  # original, two samples, two heat maps
    assert sheet.height > 3 * 192

    facts = json.loads(Path("out/reconstructions.json").read_text())
    assert [fact["picture"] for fact in facts] == pictures
    pipeline = FeatInvPipeline.from_pretrained(exported)
    original = pipeline.classify(pipeline.crop([Image.open(pictures[2])]))
    drawn = pipeline.reconstruct(original["features"][0], num_samples=2, seed=3)
    saved = torch.stack(
        [pipeline.inverter.classifier.crop(Image.open(f"out/grey-{number}.png")) for number in range(2)]
    )
    assert torch.equal(to_uint8(saved), to_uint8(drawn))
    cosines = torch.cosine_similarity(pipeline.classify(saved)["features"], original["features"]).mean((1, 2))
    assert [sample["cosine"] for sample in facts[2]["samples"]] == pytest.approx(cosines.tolist(), abs=1e-4)

    local = torch.cosine_similarity(pipeline.classify(saved)["features"], original["features"]).mean(0)
    assert facts[2]["cosine_by_location"] == pytest.approx(np.array(local.tolist()), abs=1e-4)
    spread = ((saved + 1) / 2).std(0).square().mean(0).sqrt()
    assert facts[2]["pixel_spread"] == pytest.approx(
        {"mean": spread.mean().item(), "max": spread.max().item()}, abs=1e-3
    )

    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    main([*command, "again"])
    assert {path.name: path.read_bytes() for path in Path("again").iterdir()} == before


def test_reconstruct_in_mixed_precision_draws_nearly_the_same(exported: Path, pictures: list[str]) -> None:
    command = ["reconstruct", "--model", str(exported), *pictures, "--num_samples", "1"]
    main([*command, "--out", "full"])
    main([*command, "--out", "half", "--precision", "bf16"])
    full, half = (
        np.stack([np.asarray(Image.open(path), dtype=float) for path in sorted(Path(folder).glob("*-0.png"))])
        for folder in ("full", "half")
    )
    assert 0 < np.abs(full - half).mean() < 4  # of 255


def test_a_pipeline_in_mixed_precision_is_not_saved(exported: Path) -> None:
    pipeline = FeatInvPipeline.from_pretrained(exported).to("cpu", torch.bfloat16)
    assert pipeline.inverter.prior.unet.conv_in.weight.dtype == torch.bfloat16
    with pytest.raises(UserError, match="Save one in full precision"):
        pipeline.save_pretrained(Path("again"))
    assert not Path("again").exists()


def test_reconstruct_refuses_a_bad_picture_before_it_draws(
    exported: Path, pictures: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("bad.png").write_text("no picture")
    for bad in ("bad.png", "missing.png"):
        message = refused(["reconstruct", "--model", str(exported), *pictures, bad, "--out", "out"], capsys)
        assert f"IMAGE: '{bad}' cannot be read as a picture" in message
    assert not Path("out").exists()


# Folders that will not do


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no index", "there is no file 'model/model_index.json'"),
        ("broken index", "'model/model_index.json' is damaged"),
        ("empty index", "'model/model_index.json' is damaged"),
        ("no encoder", "there is no file 'model/encoder/diffusion_pytorch_model.safetensors'"),
        ("half a control", "1 tensors of the controlnet in 'model' are missing"),
        (
            "another backbone",
            "the frozen parts of 'model' are not those that its control was trained with (backbone: ",
        ),
    ],
)
def test_refuses_a_model(damage: str, message: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / SUMS).unlink()  # as in folders of before
    index, control = model / "model_index.json", model / "controlnet" / "diffusion_pytorch_model.safetensors"
    if damage == "no index":
        index.unlink()
    elif damage == "broken index":
        index.write_text(index.read_text()[:50])
    elif damage == "empty index":
        index.write_text("{}")
    elif damage == "no encoder":
        shutil.rmtree(model / "encoder")
    elif damage == "half a control":
        weights = load_file(control)
        del weights["conv_in.bias"]
        save_file(weights, control)
    else:
        file = model / "backbone" / "model.safetensors"
        weights = load_file(file)
        next(iter(weights.values())).add_(1)
        save_file(weights, file, {"format": "pt"})
    assert message in refused(["reconstruct", "--model", "model", "a.png", "--out", "out"], capsys)


def test_every_change_of_a_model_is_noticed(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """But for that of its card, which its author may go on with; `sha256sum` reads the same file."""
    (model / "README.md").write_text("Another card")
    (model / ".gitattributes").write_text("what a hub adds")
    subprocess.run(["sha256sum", "--check", "--quiet", SUMS], cwd=model, check=True)
    FeatInvPipeline.from_pretrained(model)
    (model / "encoder" / "more.json").write_text("{}")
    message = refused(["reconstruct", "--model", "model", "a.png", "--out", "out"], capsys)
    assert (
        "1 files of 'model' are not as SHA256SUMS in it says, such as 'encoder/more.json'. Copy the folder" in message
    )
