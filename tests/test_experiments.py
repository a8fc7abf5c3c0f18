"""Every shipped YAML says what the code accepts."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from timm.data import create_transform
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from configurations import effective_config
from featinv_pl.__main__ import overlaid
from featinv_pl.nets.backbone import Backbone
from featinv_pl.sampling.sampler import AUTHORS, Sampler
from featinv_pl.types import to_uint8
from smoke.acts import sources_of
from smoke.files import EXTRACTIONS
from smoke.targets import make, started

ROOT = Path(__file__).parents[1]
EXPERIMENTS = ROOT / "experiments"
# What an overlay is laid over; all other files are whole experiments.
OVER = {
    "bench": "bench/authors.yaml",
    "imagenet/memory": "imagenet/train/convnext-spatial.yaml",
    "imagenet/gpus": "imagenet/train/resnet50-spatial.yaml",
    "imagenet/extract/crops": "imagenet/extract/crops/resnet50.yaml",
    "imagenet/backbones": "imagenet/train/resnet50-spatial.yaml",
    "imagenet/extract/sources": "imagenet/extract/crops/resnet50.yaml",
    "imagenet/test": "imagenet/train/resnet50-spatial.yaml",
    "imagenet/train/recipes": "imagenet/train/resnet50-spatial.yaml",
    "sweeps": "imagenet/train/convnext-spatial.yaml",
}
OVERLAYS = (
    "trainer.yaml",
    "debug.yaml",
    "digits/inversion.yaml",
    "digits/trainer.yaml",
    "cifar10/trainer.yaml",
    "cifar10/features.yaml",
    "own/own.yaml",
    "photos/trainer.yaml",
    "photos/features.yaml",
)
STUDIES = tuple(f"study/{name}.yaml" for name in ("digits", "cifar10", "choices", "photos", "layers", "layers-photos"))
SWEEPS = ("sweeps/backbones.yaml", "sweeps/encoder.yaml", "sweeps/guidance.yaml")
BACKBONES = {"resnet50": (2048, 7, 7), "convnext": (1024, 9, 9), "swinv2": (1024, 12, 12)}
FILES = {path.relative_to(EXPERIMENTS).as_posix() for path in EXPERIMENTS.rglob("*.yaml")}


@cache
def settings(*names: str) -> dict[str, Any]:
    """What files amount to, of which later ones override earlier ones."""
    ends = ("adversarial.yaml", "shards.yaml", "corrupted.yaml", "shapes.yaml", "few.yaml")
    extracts = "extract" in names[-1] or names[-1].endswith(ends) or "adversarial" in names[-1]
    return effective_config(["predict" if extracts else "fit", *(f"--config={EXPERIMENTS / name}" for name in names)])


@pytest.mark.parametrize("name", sorted(FILES - {*SWEEPS, *STUDIES}))
def test_yaml_is_parsed(name: str) -> None:
    """Overlays are laid over a whole experiment; all others stand alone, and their schedule ends with training."""
    beneath = "digits/spatial.yaml" if name in OVERLAYS else OVER.get(Path(name).parent.as_posix())
    found = settings(*([beneath] if beneath else []), name)
    assert found["model"]["class_path"].startswith(("featinv_pl.", "bench."))
    schedule = found["model"]["init_args"].get("lr_scheduler")
    if schedule and not beneath:
        assert schedule["init_args"]["total_steps"] == found["trainer"]["max_steps"]


@pytest.mark.parametrize("name", ["digits/spatial.yaml", "imagenet/extract/resnet50.yaml"])
def test_what_is_saved_of_a_run_is_the_same_run(name: str) -> None:
    saved = Path("saved.yaml")
    saved.write_text(yaml.safe_dump(settings(name)))
    assert effective_config(["predict" if "extract" in name else "fit", "--config", str(saved)]) == settings(name)


@pytest.mark.parametrize("name", STUDIES)
def test_every_run_of_a_study_is_parsed(name: str) -> None:
    """As the workflow starts it, with one seed."""
    plan = yaml.safe_load((EXPERIMENTS / name).read_text())
    for needed in plan["needs"]:
        Path(needed).mkdir(parents=True)
    Path("plan.yaml").write_text(yaml.safe_dump({**plan, "seeds": [7]}, sort_keys=False))
    commands = started(make("study-cifar10", short=False, STUDY="plan.yaml", FLAGS="--dry-run"))
    fits = [command for command in commands if command[0] == "fit"]
    tested = [command[1 : command.index("--ckpt_path")] for command in commands if command[0] == "test"]
    folders = set()
    for command in fits:
        found = effective_config(command)
        folders.add(found["trainer"]["default_root_dir"])
        schedule = found["model"]["init_args"]["lr_scheduler"]
        assert schedule is None or schedule["init_args"]["total_steps"] == found["trainer"]["max_steps"]
        if (folder := Path(found["trainer"]["default_root_dir"])).name == "7":
            assert found["seed_everything"] == 7
            assert command[1 : command.index("--ckpt_path")] in tested, folder
    assert {f"{plan['folder']}/{run}/7" for run in plan["runs"]} <= folders


# ImageNet


@pytest.mark.parametrize("name", ["12gb", "24gb", "80gb"])
def test_small_gpus_take_the_same_steps(name: str) -> None:
    """As many samples in each, and validation as often, which Lightning counts in batches."""
    recipe = OVER["imagenet/memory"]
    whole, small = settings(recipe), settings(recipe, f"imagenet/memory/{name}.yaml")
    accumulated = small["trainer"]["accumulate_grad_batches"]
    assert small["data"]["init_args"]["batch_size"] * accumulated == whole["data"]["init_args"]["batch_size"]
    assert small["trainer"]["val_check_interval"] == whole["trainer"]["val_check_interval"] * accumulated
    assert small["trainer"]["max_steps"] == whole["trainer"]["max_steps"]


@pytest.mark.parametrize("name", ["resnet50", "convnext", pytest.param("swinv2", marks=pytest.mark.slow)])
def test_backbones_give_the_maps_of_the_paper(name: str) -> None:
    extract = settings(f"imagenet/extract/{name}.yaml")
    model, data = extract["model"]["init_args"], extract["data"]["init_args"]
    backbone = Backbone(model["backbone"], "random", model["layer"], model["input_size"])
    assert backbone.feature_shape == BACKBONES[name]
    picture, side = Image.effect_noise((400, 300), 60).convert("RGB"), data["image_size"]
    crop = create_transform((3, side, side), interpolation="bicubic", crop_pct=data["crop_pct"], normalize=False)
    assert torch.equal(to_uint8(backbone.crop(picture)), crop(picture))


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("conditioning", ["spatial", "pooled"])
def test_recipes(name: str, conditioning: str) -> None:
    ours, authors = (settings(f"imagenet/train/{name}-{conditioning}{recipe}.yaml") for recipe in ("", "-authors"))
    extract = settings(f"imagenet/extract/{name}.yaml")["model"]["init_args"]
    for run in (ours, authors):
        model = run["model"]["init_args"]
        assert model["conditioning"] == conditioning
        assert {model[key] == extract[key] for key in ("backbone", "input_size", "image_size")} == {True}
        assert model["prior"] == extract["autoencoder"]
        assert run["trainer"]["max_steps"] * run["data"]["init_args"]["batch_size"] == 3_840_000
    assert ours["trainer"]["default_root_dir"] != authors["trainer"]["default_root_dir"]
    trained = authors["model"]["init_args"]
    assert (trained["optimizer"]["class_path"], trained["optimizer"]["init_args"]["lr"]) == ("torch.optim.AdamW", 1e-5)
    assert (trained["objective"]["dropout"], trained["objective"]["weighting"]) == (0.15, "none")
    assert Sampler.from_fields(trained["sampler"]) == AUTHORS
    assert Sampler.from_fields(ours["model"]["init_args"]["sampler"]) == Sampler()
    assert authors["data"]["init_args"]["batch_size"] == 8
    assert [run["trainer"]["precision"] for run in (ours, authors)] == ["bf16-mixed", "32-true"]


@pytest.mark.parametrize("name", BACKBONES)
def test_every_shard_set_that_is_read_is_written(name: str) -> None:
    written = set()
    for variant in EXTRACTIONS:
        extract = settings(f"imagenet/extract/{name}{variant}.yaml")
        folder = extract["trainer"]["default_root_dir"]
        written |= {f"{folder}/{source}" for source in sources_of(extract["data"]["init_args"])}
    for run in ("spatial", "pooled", "spatial-authors", "pooled-authors"):
        data = settings(f"imagenet/train/{name}-{run}.yaml")["data"]["init_args"]
        assert {data["train"], data["val"], *data["test"].values()} <= written
    text = yaml.safe_load((EXPERIMENTS / f"imagenet/test/{name}.yaml").read_text())
    assert set(text["data"]["init_args"]["test"].values()) == {path for path in written if "/train" not in path}
    data = settings(f"imagenet/extract/{name}-train-authors.yaml")["data"]["init_args"]
    assert (data["views"], data["vertical_flip"]) == (3, True)


# Sweeps


@pytest.mark.parametrize("digits", [False, True])
@pytest.mark.parametrize("name", SWEEPS)
def test_sweeps_try_options_that_there_are(name: str, digits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each value arrives as the client's agent writes it, and is what the run then has; on digits, the first ones."""
    monkeypatch.chdir(ROOT)
    sweep = yaml.safe_load((EXPERIMENTS / name).read_text())
    # The values that it tries, or the ends of their range.
    values = {
        name: one["values"] if "values" in one else [one["min"], one["max"]]
        for name, one in sweep["parameters"].items()
    }
    overlay = f"experiments/sweeps/digits{'-guidance' * ('guidance' in name)}.yaml" if digits else None
    for number in range(1 if digits else max(map(len, values.values()))):
        tried = {option: some[number % len(some)] for option, some in values.items()}
        args = create_sweep_command_args({"args": {option: {"value": value} for option, value in tried.items()}})
        words = [part for item in sweep["command"] for part in (args["args"] if item == "${args}" else [item])]
        assert words[:2] == ["${env}", "featinv-pl"]
        parsed = effective_config(overlaid(words[2:], overlay))
        for option, value in tried.items():
            found: Any = parsed
            for key in option.split("."):
                found = found.get(key, found.get("init_args", {}).get(key)) if option != "config" else value
            assert found == value, option
        callbacks = {item["class_path"].split(".")[-1]: item for item in parsed["trainer"]["callbacks"]}
        assert callbacks["ModelCheckpoint"]["init_args"]["dirpath"] is None
        assert parsed["trainer"]["default_root_dir"] == "runs/featinv-pl"
        assert sweep["metric"]["name"].startswith("val/")
        assert parsed["data"]["init_args"]["val"]
        if "optimizer.lr" in str(tried):  # which a schedule with a rate of its own would hide
            assert parsed["model"]["init_args"]["lr_scheduler"] is None
        if "early_terminate" in sweep:
            validations = parsed["trainer"]["max_steps"] // parsed["trainer"]["val_check_interval"]
            assert validations >= 3 * sweep["early_terminate"]["min_iter"]
        if digits:
            assert parsed["model"]["init_args"]["backbone"] == "runs/demo/classifier/model"
            assert parsed["ckpt_path"] == ("runs/demo/spatial/inversion.ckpt" if "guidance" in name else None)
