"""Configurations as people and sweeps write them: what they may name, and how messages name their options."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from configurations import effective_config
from featinv_pl.__main__ import main
from featinv_pl.errors import UserError, spelled
from featinv_pl.runtime.averaging import MovingAverage
from interrupts import Capture
from test_cli import refused
from tiny import write

MODEL: dict[str, Any] = {"class_path": "FeatureInversion", "init_args": {"backbone": "resnet18", "prior": "prior"}}


def parsed(*args: str) -> dict[str, Any]:
    return effective_config(["fit", *args])


def test_base_lies_beneath() -> None:
    Path("below").mkdir()
    trainer = {"max_steps": 1, "precision": 32, "callbacks": [{"class_path": "MovingAverage"}]}
    write(Path("root.yaml"), {"trainer": trainer})
    write(Path("below/middle.yaml"), {"base": "../root.yaml", "trainer": {"max_steps": 2}})
    top = {"base": "below/middle.yaml", "trainer": {"callbacks+": [{"class_path": "Evaluation"}]}, "model": MODEL}
    config = write(Path("top.yaml"), top)
    with pytest.MonkeyPatch.context() as patch:  # jsonargparse will no longer change into the folder of what it reads
        patch.setattr(os, "chdir", lambda _: None)
        assert parsed("--config", config)["trainer"]["max_steps"] == 2
    found = parsed("--config", config)["trainer"]
    assert (found["max_steps"], found["precision"]) == (2, 32)
    names = [callback["class_path"].split(".")[-1] for callback in found["callbacks"]]
    assert names == ["MovingAverage", "Evaluation"]


@pytest.mark.parametrize("null", ["None", "null"])
def test_null_of_a_sweep_is_null_where_there_is_one(null: str) -> None:
    settings = {"model": {**MODEL, "init_args": {**MODEL["init_args"], "input_size": "None"}}}
    config = write(Path("model.yaml"), settings)
    found = parsed("--config", config, f"--model.lr_scheduler={null}", f"--trainer.max_time={null}")
    model = found["model"]["init_args"]
    assert (model["lr_scheduler"], model["input_size"], found["trainer"]["max_time"]) == (None,) * 3


def test_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(Path("base.yaml"), {"trainer": {"default_root_dir": "~/run"}})
    write(Path("top.yaml"), {"base": "~/base.yaml", "model": MODEL, "data": {"class_path": "FolderData"}})
    options = ["--model.backbone=~/b", "--data.train=~/t", '--data.predict={"a": "~/p"}']
    with pytest.raises(SystemExit):
        main(["fit", "--config=~/top.yaml", *options, "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["trainer"]["default_root_dir"] == f"{tmp_path}/run"
    assert config["model"]["init_args"]["backbone"] == f"{tmp_path}/b"
    assert config["data"]["init_args"]["train"] == f"{tmp_path}/t"
    assert config["data"]["init_args"]["predict"] == {"a": f"{tmp_path}/p"}
    with pytest.raises(SystemExit):
        main(["verify", "~/shards"])
    assert f"no folder '{tmp_path}/shards'" in capsys.readouterr().err


def test_values_are_filled_in() -> None:
    """Those of a base too, which the including file may change; one that is alone keeps its type."""
    values = {"size": 32, "name": "ours"}
    write(Path("base.yaml"), {"values": values, "trainer": {"default_root_dir": "runs/${name}/${size}"}})
    model = {"class_path": "FeatureInversion", "init_args": {"backbone": "b", "prior": "p", "image_size": "${size}"}}
    write(Path("top.yaml"), {"base": "base.yaml", "values": {"size": 64}, "model": model})
    config = parsed("--config=top.yaml")
    assert config["trainer"]["default_root_dir"] == "runs/ours/64"
    assert config["model"]["init_args"]["image_size"] == 64


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("base: top.yaml", "top.yaml' is its own base"),
        ("base: nowhere.yaml", "nowhere.yaml'. The path is relative to the including file"),
        ("{values: {a: 1, b: 2}, seed_everything: '${c}'}", "'${c}': `values` has no 'c', but a, b."),
        ("seed_everything: 2020-99-99", "'2020-99-99' is not"),
        ("\xff", "top.yaml' is damaged or of another kind"),
        (None, "top.yaml' is damaged or of another kind (it is not a file). Give a YAML file."),
    ],
)
def test_a_configuration_that_cannot_be_read(config: str | None, message: str, capsys: Capture) -> None:
    if config is None:
        os.mkfifo("top.yaml")  # as of a shell's `<(...)`, which cannot be read twice
    else:
        Path("top.yaml").write_bytes(config.encode("latin1"))
    with pytest.raises(SystemExit):
        main(["fit", "--config", "top.yaml"])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "advice"),
    [
        ("hidden_channels", "'hidden_channels' of an earlier version is `model.encoder.hidden_channels` now"),
        ("judge", "'judge' of an earlier version is `judge` of the Evaluation callback now"),
        ("sampler.text_scale", "'text_scale' of an earlier version has been removed"),
        ("callbacks", "'PerSource' of an earlier version is part of the Evaluation callback now."),
    ],
)
def test_what_has_moved_is_named(option: str, advice: str) -> None:
    config = write(Path("model.yaml"), {"model": MODEL})
    first, _, last = option.partition(".")
    older: dict[str, Any] = {"model": {"init_args": {first: {last: 1} if last else 1}}}
    if option == "callbacks":
        older = {"trainer": {"callbacks": [{"class_path": "PerSource", "init_args": {"clean": "val"}}]}}
    lines = [["--config", write(Path("old.yaml"), older)], [f"--model.{option}=1"]]
    for given in lines[: 1 if option == "callbacks" else 2]:
        with pytest.raises(UserError, match=f"^{advice}"):
            parsed("--config", config, *given)


@pytest.mark.parametrize(
    ("option", "message"),
    [("model.execution.compile=maybe", "'maybe' is not"), ("data.train=x", "DigitsData has no option --data.train")],
)
def test_a_wrong_value_is_not_taken_for_an_option_of_an_earlier_version(option: str, message: str) -> None:
    config = write(Path("model.yaml"), {"model": MODEL, "data": {"class_path": "DigitsData"}})
    with pytest.raises(UserError) as refused:
        parsed("--config", config, f"--{option}")
    assert message in str(refused.value)
    assert "earlier version" not in str(refused.value)


CALL: dict[str, Any] = {"class_path": "lightning.pytorch.cli.instantiate_class"}
CALL["init_args"] = {"args": "touch ran", "init": {"class_path": "os.system"}}
CLASSIFIER: dict[str, Any] = {"model": "test_resnet", "num_classes": 10, "image_size": 32}
SETTINGS: dict[str, Any] = {
    "trainer": {"accelerator": "cpu", "logger": False},
    "model": {"class_path": "Classifier", "init_args": CLASSIFIER},
    "data": {"class_path": "DigitsData"},
}


PLACES = ("trainer.callbacks+", "model.optimizer", "model.lr_scheduler", "model", "data", "trainer.logger")


@pytest.mark.parametrize("place", PLACES)
def test_untrusted_classes_are_not_imported(
    place: str, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("evil.py").write_text("from pathlib import Path\nPath('ran').touch()\nclass Evil:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    args = ["fit", "--config", write(Path("fit.yaml"), SETTINGS), f"--{place}=evil.Evil"]
    refused(args, capsys, "not trusted: 'evil.Evil' would be imported and run", "FEATINV_IMPORTS=evil (")
    assert not Path("ran").exists()


def test_the_module_that_loads_code_is_not_trusted_with_torch(capsys: Capture) -> None:
    args = ["fit", "--config", write(Path("fit.yaml"), SETTINGS), "--model.optimizer=torch.hub.load"]
    refused(args, capsys, "not trusted: 'torch.hub.load'", "FEATINV_IMPORTS=torch.hub (")


def test_nothing_is_made_where_anything_may_stand(capsys: Capture) -> None:
    model = {"class_path": "Classifier", "init_args": {**CLASSIFIER, "model_args": {"name": CALL}}}
    with pytest.raises(ValueError, match="unexpected keyword argument 'name'"):
        main(["fit", "--config", write(Path("fit.yaml"), {**SETTINGS, "model": model})])
    assert not Path("ran").exists()
    refused(["fit", f"--model={json.dumps(CALL)}"], capsys, "not trusted: 'lightning.pytorch.cli.instantiate_class'")


def test_trust_is_given_to_modules(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATINV_IMPORTS", "good, os;evil")
    refused(["fit", "--help"], capsys, "FEATINV_IMPORTS: 'os;evil' is not a package or module. Separate several")


OPTIONS = [
    *("--model.steps", "--model.sampler.steps", "--data.train", "--data.test.imagenet-a"),
    *("--trainer.a.lr", "--trainer.b.lr", "--seed"),
]


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("seed", "--seed"),
        ("train", "--data.train"),
        ("data.train", "--data.train"),
        ("steps", "--model.steps"),  # the option on top, rather than one of a group
        ("sampler.steps", "--model.sampler.steps"),
        ("lr", "`lr`"),  # of two
        ("data.test.imagenet-a", "--data.test.imagenet-a"),
        ("rain", "`rain`"),
        ("featinv-pl export", "`featinv-pl export`"),
    ],
)
def test_names_in_backticks_become_options(name: str, option: str) -> None:
    assert spelled(f"`{name}` must be at least 1.", OPTIONS) == f"{option} must be at least 1."


def test_the_command_spells_options(capsys: Capture) -> None:
    with pytest.raises(UserError, match="`decay` must lie between 0 and 1, and is 2"):
        MovingAverage(2.0)
    model = ["--model=Classifier", "--model.model=test_resnet", "--model.num_classes=10", "--model.image_size=32"]
    with pytest.raises(SystemExit):
        main(["fit", *model, "--data=DigitsData", "--trainer.callbacks+=MovingAverage", "--trainer.callbacks.decay=2"])
    assert capsys.readouterr().err == (
        "featinv-pl: error: --trainer.callbacks.decay must lie between 0 and 1, and is 2.0.\n"
    )
