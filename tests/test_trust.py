"""A class path in a configuration is an import and a call."""

import json
from pathlib import Path
from typing import Any

import pytest

from featinv_pl.__main__ import main
from test_cli import refused
from tiny import write

CALL: dict[str, Any] = {"class_path": "lightning.pytorch.cli.instantiate_class"}
CALL["init_args"] = {"args": "touch ran", "init": {"class_path": "os.system"}}
MODEL: dict[str, Any] = {"model": "test_resnet", "num_classes": 10, "image_size": 32}
SETTINGS: dict[str, Any] = {
    "trainer": {"accelerator": "cpu", "logger": False},
    "model": {"class_path": "Classifier", "init_args": MODEL},
    "data": {"class_path": "DigitsData"},
}


PLACES = ("trainer.callbacks+", "model.optimizer", "model.lr_scheduler", "model", "data", "trainer.logger")


@pytest.mark.parametrize("place", PLACES)
def test_classes_that_nobody_trusts_are_not_imported(
    place: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("evil.py").write_text("from pathlib import Path\nPath('ran').touch()\nclass Evil:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    args = ["fit", "--config", write(Path("fit.yaml"), SETTINGS), f"--{place}=evil.Evil"]
    refused(args, capsys, "not trusted: 'evil.Evil' would be imported and run", "FEATINV_IMPORTS=evil (")
    assert not Path("ran").exists()


def test_the_module_that_loads_code_is_not_trusted_with_torch(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["fit", "--config", write(Path("fit.yaml"), SETTINGS), "--model.optimizer=torch.hub.load"]
    refused(args, capsys, "not trusted: 'torch.hub.load'", "FEATINV_IMPORTS=torch.hub (")


def test_nothing_is_made_where_anything_may_stand(capsys: pytest.CaptureFixture[str]) -> None:
    model = {"class_path": "Classifier", "init_args": {**MODEL, "model_args": {"name": CALL}}}
    with pytest.raises(ValueError, match="unexpected keyword argument 'name'"):
        main(["fit", "--config", write(Path("fit.yaml"), {**SETTINGS, "model": model})])
    assert not Path("ran").exists()
    refused(["fit", f"--model={json.dumps(CALL)}"], capsys, "not trusted: 'lightning.pytorch.cli.instantiate_class'")


def test_trust_is_given_to_modules(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATINV_IMPORTS", "good, os;evil")
    refused(["fit", "--help"], capsys, "FEATINV_IMPORTS: 'os;evil' is not a package or module. Separate several")
