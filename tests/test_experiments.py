"""Every shipped YAML says what the code accepts."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from configurations import effective_config
from featinv_pl.__main__ import overlaid
from featinv_pl.nets.backbone import Backbone
from featinv_pl.sampling.sampler import AUTHORS, Sampler
from smoke.targets import make, started

ROOT = Path(__file__).parents[1]
EXPERIMENTS = ROOT / "experiments"
# What an overlay is laid over; all other files are whole experiments.
OVER = {
    "": "digits/spatial.yaml",
    "bench/": "bench/authors.yaml",
    "imagenet/memory/": "imagenet/train/convnext-spatial.yaml",
    "imagenet/extract/crops/": "imagenet/extract/crops/resnet50.yaml",
    "imagenet/backbones/": "imagenet/train/resnet50-spatial.yaml",
    "imagenet/extract/sources/": "imagenet/extract/crops/resnet50.yaml",
    "imagenet/test/": "imagenet/train/resnet50-spatial.yaml",
    "imagenet/train/recipes/": "imagenet/train/resnet50-spatial.yaml",
    "sweeps/": "imagenet/train/convnext-spatial.yaml",
}
OVERLAYS = {
    *("trainer.yaml", "debug.yaml", "digits/inversion.yaml", "digits/trainer.yaml"),
    "cifar10/trainer.yaml",
    "imagenet/extract/crops/extraction.yaml",
}


STUDIES = ("study/digits.yaml", "study/cifar10.yaml")
SWEEPS = ("sweeps/backbones.yaml", "sweeps/encoder.yaml", "sweeps/guidance.yaml")


def command(name: str) -> str:
    return "predict" if "extract" in name or name.endswith(("adversarial.yaml", "shards.yaml")) else "fit"


def names() -> list[str]:
    found = {path.relative_to(EXPERIMENTS).as_posix() for path in EXPERIMENTS.rglob("*.yaml")}
    return sorted(found - {*SWEEPS, *STUDIES})


@pytest.mark.parametrize("name", names())
def test_yaml_is_parsed(name: str) -> None:
    """Overlays are laid over a whole experiment; all others stand alone."""
    folder = name.removesuffix(Path(name).name)
    config = ["--config", str(EXPERIMENTS / name)]
    if name in OVERLAYS or folder in OVER.keys() - {""}:
        config = ["--config", str(EXPERIMENTS / OVER.get(folder, OVER[""])), *config]
    verb = command(name)
    parsed = yaml.safe_load(effective_config([verb, *config]))[verb]
    assert parsed["model"]["class_path"].startswith(("featinv_pl.", "bench."))
    again = Path("again.yaml")
    again.write_text(yaml.safe_dump(parsed))
    assert yaml.safe_load(effective_config([verb, "--config", str(again)]))[verb] == parsed


@pytest.mark.parametrize("name", STUDIES)
def test_every_run_of_a_study_is_parsed(name: str) -> None:
    """As the workflow starts it, with one seed."""
    plan = yaml.safe_load((EXPERIMENTS / name).read_text())
    for needed in plan["needs"]:
        Path(needed).mkdir(parents=True)
    Path("plan.yaml").write_text(yaml.safe_dump({**plan, "seeds": [7]}, sort_keys=False))
    models = {}
    for command, *options in started(make("study-cifar10", short=False, STUDY="plan.yaml", FLAGS="--dry-run")):
        if command == "export":
            continue
        settings = yaml.safe_load(effective_config([command, *options]))[command]
        folder = settings["trainer"]["default_root_dir"]
        if command == "fit":
            models[folder] = settings["model"]
            schedule = settings["model"]["init_args"]["lr_scheduler"]
            assert schedule is None or schedule["init_args"]["total_steps"] == settings["trainer"]["max_steps"]
        elif command == "test":
            assert settings["seed_everything"] == 7
            assert settings["model"] == models[folder]
    assert {f"{plan['folder']}/{run}/7" for run in plan["runs"]} <= models.keys()


def test_schedules_end_with_training() -> None:
    """OneCycleLR raises after its last step, and never gets there if it is longer than training."""
    for name in names():
        whole = not name.endswith(("extract.yaml", "adversarial.yaml", "trainer.yaml", "shards.yaml", "authors.yaml"))
        if name.startswith(("digits/", "cifar10/", "study/digits/")) and whole:
            parsed = yaml.safe_load(effective_config(["fit", "--config", str(EXPERIMENTS / name)]))["fit"]
            schedule = parsed["model"]["init_args"]["lr_scheduler"]["init_args"]
            assert schedule["total_steps"] == parsed["trainer"]["max_steps"], name


@pytest.mark.parametrize("name", sorted(path.name for path in (EXPERIMENTS / "imagenet/memory").iterdir()))
def test_small_gpus_take_the_same_steps(name: str) -> None:
    """As many samples in each, and validation as often, which Lightning counts in batches."""
    recipe = EXPERIMENTS / "imagenet/train/convnext-spatial.yaml"
    configs = ["--config", str(recipe), "--config", str(EXPERIMENTS / "imagenet/memory" / name)]
    whole = yaml.safe_load(effective_config(["fit", *configs[:2]]))["fit"]
    small = yaml.safe_load(effective_config(["fit", *configs]))["fit"]
    accumulated = small["trainer"]["accumulate_grad_batches"]
    assert small["data"]["init_args"]["batch_size"] * accumulated == whole["data"]["init_args"]["batch_size"]
    assert small["trainer"]["val_check_interval"] == whole["trainer"]["val_check_interval"] * accumulated
    assert small["trainer"]["max_steps"] == whole["trainer"]["max_steps"]


def test_corrupted_sources_have_at_least_four_corruptions_at_two_severities() -> None:
    config = str(EXPERIMENTS / "digits/extract.yaml")
    parsed = yaml.safe_load(effective_config(["predict", "--config", config]))["predict"]
    severities: dict[str, set[str]] = {}
    for source in parsed["data"]["init_args"]["sources"]:
        if source.startswith("corrupted/"):
            _, corruption, severity = source.split("/")
            severities.setdefault(corruption, set()).add(severity)
    assert len(severities) >= 4
    assert min(map(len, severities.values())) >= 2


# ImageNet

BACKBONES = {"resnet50": (2048, 7, 7), "convnext": (1024, 9, 9), "swinv2": (1024, 12, 12)}


@cache
def settings(name: str) -> dict[str, Any]:
    """What a file amounts to."""
    verb = command(name)
    text = effective_config([verb, "--config", str(EXPERIMENTS / "imagenet" / name)])
    parsed: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return parsed[verb]


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_give_the_maps_of_the_paper(name: str) -> None:
    extract = settings(f"extract/{name}.yaml")
    model, data = extract["model"]["init_args"], extract["data"]["init_args"]
    backbone = Backbone(model["backbone"], "random", model["layer"], model["input_size"])
    assert backbone.feature_shape == BACKBONES[name]
    assert (backbone.input_size[0], backbone.crop_pct) == (data["image_size"], data["crop_pct"])


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("conditioning", ["spatial", "pooled"])
def test_recipes(name: str, conditioning: str) -> None:
    ours = settings(f"train/{name}-{conditioning}.yaml")
    authors = settings(f"train/{name}-{conditioning}-authors.yaml")
    for run in (ours, authors):
        model, extract = run["model"]["init_args"], settings(f"extract/{name}.yaml")["model"]["init_args"]
        assert model["conditioning"] == conditioning
        assert [model[key] for key in ("backbone", "input_size", "image_size")] == [
            extract[key] for key in ("backbone", "input_size", "image_size")
        ]
        assert model["prior"] == extract["autoencoder"]
        samples = run["trainer"]["max_steps"] * run["data"]["init_args"]["batch_size"]
        assert samples == 3_840_000
    assert ours["trainer"]["default_root_dir"] != authors["trainer"]["default_root_dir"]
    trained = authors["model"]["init_args"]
    assert trained["optimizer"] == {**trained["optimizer"], "class_path": "torch.optim.AdamW"}
    assert trained["optimizer"]["init_args"]["lr"] == 1e-5
    assert trained["objective"]["dropout"] == 0.15
    assert trained["objective"]["min_snr_gamma"] is None
    assert Sampler.from_fields(trained["sampler"]) == AUTHORS
    assert Sampler.from_fields(ours["model"]["init_args"]["sampler"]) == Sampler()
    schedule = ours["model"]["init_args"]["lr_scheduler"]
    assert schedule["init_args"]["total_steps"] == ours["trainer"]["max_steps"]
    assert authors["data"]["init_args"]["batch_size"] == 8
    assert authors["trainer"]["precision"] == "32-true"
    assert ours["trainer"]["precision"] == "bf16-mixed"


@pytest.mark.parametrize("name", BACKBONES)
def test_every_shard_set_that_is_read_is_written(name: str) -> None:
    written = set()
    for variant in ("", "-train", "-train-authors", "-robustness", "-imagenet-c", "-adversarial"):
        extract = settings(f"extract/{name}{variant}.yaml")
        folder = extract["trainer"]["default_root_dir"]
        written |= {f"{folder}/{source}" for source in extract["data"]["init_args"]["predict"]}
    for run in ("spatial", "pooled", "spatial-authors", "pooled-authors"):
        data = settings(f"train/{name}-{run}.yaml")["data"]["init_args"]
        assert {data["train"], data["val"], *data["test"].values()} <= written
    text = yaml.safe_load((EXPERIMENTS / f"imagenet/test/{name}.yaml").read_text())
    assert set(text["data"]["init_args"]["test"].values()) == {path for path in written if "/train" not in path}
    data = settings(f"extract/{name}-train-authors.yaml")["data"]["init_args"]
    assert (data["views"], data["vertical_flip"]) == (3, True)


# Sweeps


def choices(parameter: dict[str, Any]) -> list[Any]:
    """The values that a sweep tries, or the ends of their range."""
    if "values" in parameter:
        return list(parameter["values"])
    assert parameter["distribution"] in ("uniform", "log_uniform_values")
    return [parameter["min"], parameter["max"]]


@pytest.mark.parametrize("overlay", [None, "digits.yaml"])
@pytest.mark.parametrize("name", SWEEPS)
def test_sweeps_try_options_that_there_are(name: str, overlay: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each value arrives as the client's agent writes it, and is what the run then has."""
    monkeypatch.chdir(ROOT)
    sweep = yaml.safe_load((EXPERIMENTS / name).read_text())
    values = {option: choices(parameter) for option, parameter in sweep["parameters"].items()}
    for number in range(max(map(len, values.values()))):
        tried = {option: some[number % len(some)] for option, some in values.items()}
        args = create_sweep_command_args({"args": {option: {"value": value} for option, value in tried.items()}})
        words = [part for item in sweep["command"] for part in (args["args"] if item == "${args}" else [item])]
        assert words[:2] == ["${env}", "featinv-pl"]
        if overlay and "guidance" in name:
            overlay = "digits-guidance.yaml"
        line = overlaid(words[2:], overlay and f"experiments/sweeps/{overlay}")
        parsed = yaml.safe_load(effective_config(line))[line[0]]
        for option, value in tried.items():
            found = parsed
            for key in option.split("."):
                found = found.get(key, found.get("init_args", {}).get(key)) if option != "config" else value
            assert found == value, option
        [checkpoint] = [
            item for item in parsed["trainer"]["callbacks"] if item["class_path"].endswith("ModelCheckpoint")
        ]
        assert checkpoint["init_args"]["dirpath"] is None
        assert parsed["trainer"]["default_root_dir"] == "runs/featinv-pl"
        assert sweep["metric"]["name"].startswith("val/")
        assert parsed["data"]["init_args"]["val"]
        if "optimizer.lr" in str(tried):  # which a schedule with a rate of its own would hide
            assert parsed["model"]["init_args"]["lr_scheduler"] is None
        if "early_terminate" in sweep:
            validations = parsed["trainer"]["max_steps"] // parsed["trainer"]["val_check_interval"]
            assert validations >= 3 * sweep["early_terminate"]["min_iter"]
        if overlay:
            assert parsed["model"]["init_args"]["backbone"] == "runs/demo/classifier/model"
        if overlay == "digits-guidance.yaml":
            assert parsed["ckpt_path"] == "runs/demo/spatial/inversion.ckpt"


def test_a_grid_has_every_backbone_with_both_conditionings() -> None:
    sweep = yaml.safe_load((EXPERIMENTS / "sweeps/backbones.yaml").read_text())
    assert set(sweep["parameters"]["config"]["values"]) == {
        f"experiments/imagenet/train/{name}-{conditioning}.yaml"
        for name in BACKBONES
        for conditioning in ("spatial", "pooled")
    }
