"""Weights from elsewhere are read without running anything, or refused with one message."""

import shutil
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
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


@pytest.fixture
def lightnings_object() -> Iterator[Any]:
    """An object such as old checkpoints keep, of a module that is not installed."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    kind = type("ModelCheckpoint", (), {"__module__": module.__name__})
    module.ModelCheckpoint = kind  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    yield kind()
    del sys.modules[module.__name__]


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_reads_files_of_torch(legacy: bool, wrapped: bool) -> None:
    contents = {"state_dict": OrderedDict(WEIGHTS), "epoch": 2} if wrapped else WEIGHTS
    torch.save(contents, "weights.ckpt", _use_new_zipfile_serialization=not legacy)
    read = read_weights(Path("weights.ckpt"), "CKPT")
    assert read.keys() == WEIGHTS.keys()
    assert all(torch.equal(value, WEIGHTS[name]) for name, value in read.items())


def test_reads_safetensors() -> None:
    save_file(WEIGHTS, "weights.safetensors")
    read = read_weights(Path("weights.safetensors"), "CKPT")
    assert all(torch.equal(value, WEIGHTS[name]) for name, value in read.items())


def test_objects_of_lightning_and_numpy_are_left_out(lightnings_object: Any) -> None:
    lightnings_object.best_model_path = "somewhere"
    extras = {"callbacks": {type(lightnings_object): {"best": lightnings_object}}, "score": WEIGHTS["one.bias"].numpy()}
    torch.save({"state_dict": WEIGHTS, **extras}, "weights.ckpt")
    del sys.modules[type(lightnings_object).__module__]
    sys.modules[type(lightnings_object).__module__] = types.ModuleType("empty")
    assert read_weights(Path("weights.ckpt"), "CKPT").keys() == WEIGHTS.keys()


@pytest.mark.parametrize("legacy", [False, True])
def test_never_runs_a_pickle(legacy: bool, tmp_path: Path) -> None:
    file = tmp_path / "weights.ckpt"
    torch.save(
        {"state_dict": {**WEIGHTS, "x": Runs(tmp_path / "ran")}}, file, _use_new_zipfile_serialization=not legacy
    )
    with pytest.raises(UserError, match=r"CKPT: '.*weights.* would call posix.system when loaded"):
        read_weights(file, "CKPT")
    assert not (tmp_path / "ran").exists()


class Copies:
    """A pickle that calls a function which torch itself has no list of."""

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return shutil.copyfile, (__file__, "ran")


def test_nothing_but_known_packages_is_left_out() -> None:
    torch.save({"state_dict": {**WEIGHTS, "x": Copies()}}, "weights.ckpt")
    with pytest.raises(UserError, match=r"CKPT: 'weights.ckpt' would call shutil.copyfile when loaded"):
        read_weights(Path("weights.ckpt"), "CKPT")
    assert not Path("ran").exists()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-200])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def overwritten(file: Path) -> None:
    file.write_bytes(b"<html>not found</html>")


@pytest.mark.parametrize("damage", [cut, emptied, overwritten])
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_refuses_a_damaged_file(damage: Callable[[Path], None], suffix: str) -> None:
    file = Path(f"weights{suffix}")
    if suffix == ".ckpt":
        torch.save(WEIGHTS, file)
    else:
        save_file(WEIGHTS, file)
    damage(file)
    with pytest.raises(UserError, match=f"CKPT: '{file}' is damaged or is not a file of weights"):
        read_weights(file, "CKPT")


@pytest.mark.parametrize("contents", [{"epoch": 1}, [1, 2], {"state_dict": {}}])
def test_refuses_a_file_without_tensors(contents: Any) -> None:
    torch.save(contents, "weights.ckpt")
    with pytest.raises(UserError, match=r"CKPT: 'weights.ckpt' holds no tensors"):
        read_weights(Path("weights.ckpt"), "CKPT")


def test_refuses_a_missing_file() -> None:
    with pytest.raises(UserError, match=r"CKPT: there is no file 'weights.ckpt'"):
        read_weights(Path("weights.ckpt"), "CKPT")


def cache(tmp_path: Path, name: str, file: str, contents: str) -> None:
    """Lay out the hub's cache as if a file of a repository had been fetched."""
    repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abcd")
    path = repository / "snapshots" / "0123abcd" / file
    path.parent.mkdir(parents=True)
    path.write_text(contents)


def test_a_name_of_the_hub_is_found_in_its_cache(tmp_path: Path) -> None:
    cache(tmp_path, "someone/prior", "unet/config.json", "{}")
    assert (find_folder("someone/prior", ["unet/*"], "--model.prior") / "unet" / "config.json").read_text() == "{}"


@pytest.mark.parametrize("name", ["someone/prior", "no such folder/at all"])
def test_refuses_a_source_that_cannot_be_found(name: str) -> None:
    with pytest.raises(UserError, match=f"--model.prior: '{name}' is neither a folder nor a file"):
        find_folder(name, ["*"], "--model.prior")


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
