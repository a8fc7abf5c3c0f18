"""Weights from elsewhere are read without running anything, or refused with one message."""

import shutil
import sys
import types
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from conftest import Runs
from featinv_pl.errors import UserError
from featinv_pl.nets.hub import find_folder
from featinv_pl.nets.weights import fill, read_weights

WEIGHTS = {"one.weight": torch.arange(6.0).view(2, 3), "one.bias": torch.ones(2)}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("contents", [WEIGHTS, {"state_dict": OrderedDict(WEIGHTS), "epoch": 2}])
def test_reads_files_of_torch(legacy: bool, contents: dict[str, Any]) -> None:
    torch.save(contents, "weights.ckpt", _use_new_zipfile_serialization=not legacy)
    read = read_weights(Path("weights.ckpt"), "CKPT")
    assert read.keys() == WEIGHTS.keys()
    assert all(torch.equal(value, WEIGHTS[name]) for name, value in read.items())


def test_objects_of_lightning_and_numpy_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")  # which is not installed
    kind = type("ModelCheckpoint", (), {"__module__": module.__name__})
    monkeypatch.setattr(module, "ModelCheckpoint", kind, raising=False)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    saver: Any = kind()
    saver.best_model_path = "somewhere"
    extras = {"callbacks": {kind: {"best": saver}}, "score": WEIGHTS["one.bias"].numpy()}
    torch.save({"state_dict": WEIGHTS, **extras}, "weights.ckpt")
    monkeypatch.setitem(sys.modules, module.__name__, types.ModuleType("empty"))
    assert read_weights(Path("weights.ckpt"), "CKPT").keys() == WEIGHTS.keys()


class Copies:
    """A pickle that calls a function which torch itself has no list of."""

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return shutil.copyfile, (__file__, "ran")


@pytest.mark.parametrize(
    ("code", "called", "legacy"),
    [
        (Runs(Path("ran")), "posix.system", False),
        (Runs(Path("ran")), "posix.system", True),
        (Copies(), "shutil.copyfile", False),
    ],
)
def test_never_runs_a_pickle(code: object, called: str, legacy: bool) -> None:
    torch.save({"state_dict": {**WEIGHTS, "x": code}}, "weights.ckpt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match=rf"CKPT: 'weights.ckpt' would call {called} when loaded"):
        read_weights(Path("weights.ckpt"), "CKPT")
    assert not Path("ran").exists()


@pytest.mark.parametrize("change", [lambda data: data[:-200], lambda _: b"", lambda _: b"<html>not found</html>"])
def test_refuses_a_damaged_file(change: Callable[[bytes], bytes]) -> None:
    torch.save(WEIGHTS, "weights.ckpt")
    save_file(WEIGHTS, "weights.safetensors")
    for file in (Path("weights.ckpt"), Path("weights.safetensors")):
        file.write_bytes(change(file.read_bytes()))
        with pytest.raises(UserError, match=f"CKPT: '{file}' is damaged or is not a file of weights"):
            read_weights(file, "CKPT")


def test_refuses_a_file_without_tensors() -> None:
    with pytest.raises(UserError, match=r"CKPT: there is no file 'weights.ckpt'"):
        read_weights(Path("weights.ckpt"), "CKPT")
    contents: Any
    for contents in ({"epoch": 1}, [1, 2], {"state_dict": {}}):
        torch.save(contents, "weights.ckpt")
        with pytest.raises(UserError, match=r"CKPT: 'weights.ckpt' holds no tensors"):
            read_weights(Path("weights.ckpt"), "CKPT")


def test_a_name_of_the_hub_is_found_in_its_cache(tmp_path: Path) -> None:
    repository = tmp_path / "hub/models--someone--prior"
    config = repository / "snapshots/0123abcd/unet/config.json"
    for path, text in ((repository / "refs/main", "0123abcd"), (config, "{}")):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    assert (find_folder("someone/prior", ["unet/*"], "`prior`") / "unet/config.json").read_text() == "{}"
    for name in ("someone/else", "no such folder/at all"):
        with pytest.raises(UserError, match=f"`prior`: '{name}' is neither a folder nor a file"):
            find_folder(name, ["*"], "`prior`")


@pytest.mark.parametrize(
    ("weights", "named"),
    [
        ({"weight": torch.zeros(2, 3)}, "bias"),
        ({"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "other": torch.zeros(1)}, "other"),
        ({"weight": torch.zeros(3, 2), "bias": torch.zeros(2)}, "weight"),
    ],
)
def test_filling_names_what_does_not_fit(weights: dict[str, torch.Tensor], named: str) -> None:
    network = torch.nn.Linear(3, 2)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(UserError, match=rf"CKPT: 1 tensors of the head .* \(it has 2\), such as {named}"):
        fill(network, weights, "head", "CKPT")
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
