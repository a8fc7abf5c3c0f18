"""Configurations as people and sweeps write them, through the public command."""

import contextlib
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from featinv_pl.__main__ import main
from tiny import write

MODEL: dict[str, Any] = {"class_path": "FeatureInversion", "init_args": {"backbone": "resnet18", "prior": "prior"}}


def printed(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    """The configuration that a command line amounts to."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["fit", *args, "--print_config"])
    captured = capsys.readouterr()
    assert stop.value.code == 0, captured.err
    config: dict[str, Any] = yaml.safe_load(captured.out)
    return config


@pytest.mark.parametrize("null", ["None", "null"])
def test_null_of_a_sweep_is_null_where_there_is_one(null: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = write(Path("model.yaml"), {"model": MODEL})
    options = (f"--model.{name}={null}" for name in ("objective.min_snr_gamma", "input_size"))
    model = printed(capsys, "--config", config, *options)["model"]["init_args"]
    assert (model["objective"]["min_snr_gamma"], model["input_size"]) == (None, None)
    config = write(Path("none.yaml"), {"model": {**MODEL, "init_args": {**MODEL["init_args"], "input_size": "None"}}})
    model = printed(capsys, "--config", config, "--trainer.max_time=None")["model"]["init_args"]
    assert model["input_size"] is None


def test_the_home_folder_is_expanded_wherever_a_path_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(Path("base.yaml"), {"trainer": {"default_root_dir": "~/run"}})
    write(Path("top.yaml"), {"base": "~/base.yaml", "model": MODEL, "data": {"class_path": "FolderData"}})
    config = printed(
        capsys, "--config=~/top.yaml", "--model.backbone=~/b", "--data.train=~/t", '--data.predict={"a": "~/p"}'
    )
    assert config["trainer"]["default_root_dir"] == f"{tmp_path}/run"
    assert config["model"]["init_args"]["backbone"] == f"{tmp_path}/b"
    assert config["data"]["init_args"]["train"] == f"{tmp_path}/t"
    assert config["data"]["init_args"]["predict"] == {"a": f"{tmp_path}/p"}
    with pytest.raises(SystemExit):
        main(["verify", "~/shards"])
    assert f"no folder '{tmp_path}/shards'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("base: top.yaml", "top.yaml' is its own base"),
        ("base: nowhere.yaml", "nowhere.yaml'. The path is relative to the including file"),
        ("base: [[a]]", "there is no file"),
        ("seed_everything: 2020-99-99", "Given value: 2020-99-99"),
        ("\xff", "top.yaml' is damaged or of another kind"),
        (None, "top.yaml' is damaged or of another kind (it is not a file). Give a YAML file."),
    ],
)
def test_a_configuration_that_cannot_be_read(
    config: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if config is None:
        os.mkfifo("top.yaml")  # as of a shell's `<(...)`, which cannot be read twice
    else:
        Path("top.yaml").write_bytes(config.encode("latin1"))
    with pytest.raises(SystemExit):
        main(["fit", "--config", "top.yaml"])
    assert message in capsys.readouterr().err


def test_bases_are_relative_to_their_file_wherever_the_parser_stands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of jsonargparse's coming versions, which no longer change into the folder of what they read."""
    Path("far/away").mkdir(parents=True)
    write(Path("far/root.yaml"), {"trainer": {"max_steps": 5}})
    write(Path("far/away/top.yaml"), {"base": "../root.yaml", "model": MODEL})
    for change in (os.chdir, lambda _: None):
        monkeypatch.setattr(os, "chdir", change)
        assert printed(capsys, "--config", "far/away/top.yaml")["trainer"]["max_steps"] == 5


def test_overfitting_a_few_batches_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    config = write(Path("model.yaml"), {"model": MODEL, "data": {"class_path": "FeatureShards"}})
    with contextlib.suppress(SystemExit):
        main(["fit", "--config", config, "--trainer.overfit_batches=2"])
    assert "error: --trainer.overfit_batches: each epoch takes other batches" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "advice"),
    [
        ("hidden_channels", "'hidden_channels' of an earlier version is model.encoder.hidden_channels now"),
        ("judge", "'judge' of an earlier version is judge of the Evaluation callback now"),
        ("arms.other", "'arms' of an earlier version is samplers of the Evaluation callback now"),
        ("null_map", "'null_map' of an earlier version has been removed"),
        ("sampler.text_scale", "'text_scale' of an earlier version has been removed"),
    ],
)
def test_options_of_earlier_versions_are_named(option: str, advice: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = write(Path("model.yaml"), {"model": MODEL})
    first, _, last = option.partition(".")
    older = write(Path("old.yaml"), {"model": {"init_args": {first: {last: 1} if last else 1}}})
    for given in ([f"--model.{option}=1"], ["--config", older]):
        with pytest.raises(SystemExit):
            main(["fit", "--config", config, *given])
        [line] = capsys.readouterr().err.splitlines()
        assert re.sub("`|--", "", line).startswith(f"featinv-pl: error: {advice}")


def test_a_wrong_value_is_not_taken_for_an_option_of_an_earlier_version(capsys: pytest.CaptureFixture[str]) -> None:
    config = write(Path("model.yaml"), {"model": MODEL, "data": {"class_path": "DigitsData"}})
    refused = {"model.execution.compile=maybe": "Got value: maybe", "data.train=x": "'train' is not accepted"}
    for option, why in refused.items():
        with pytest.raises(SystemExit):
            main(["fit", "--config", config, f"--{option}"])
        error = capsys.readouterr().err
        assert why in error
        assert "earlier version" not in error


def test_callbacks_of_earlier_versions_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = {"callbacks": [{"class_path": "PerSource", "init_args": {"clean": "val"}}]}
    config = write(Path("old.yaml"), {"model": MODEL, "trainer": trainer})
    with pytest.raises(SystemExit):
        main(["test", "--config", config])
    assert "'PerSource' of an earlier version is part of the Evaluation callback now." in capsys.readouterr().err
