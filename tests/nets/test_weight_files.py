"""Weights from elsewhere run nothing, frozen networks stay frozen, and a digest is of what they compute with."""

import copy
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conftest import Runs
from featinv_pl.errors import UserError
from featinv_pl.nets.frozen import Frozen, digest, keep_products_in
from featinv_pl.nets.hub import find_folder
from featinv_pl.nets.weights import read_weights

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


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (None, "there is no file 'weights.ckpt'"),
        (b"<html>not found</html>", "'weights.ckpt' is damaged or is not a file of weights"),
        ({"state_dict": {}}, "'weights.ckpt' holds no tensors"),
        ([1, 2], "'weights.ckpt' holds no tensors"),
        ({"state_dict": {**WEIGHTS, "x": Runs(Path("ran"))}}, "'weights.ckpt' would call posix.system when loaded"),
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_refuses_a_file(contents: Any, message: str, legacy: bool) -> None:
    if isinstance(contents, bytes):
        Path("weights.ckpt").write_bytes(contents)
    elif contents is not None:
        torch.save(contents, "weights.ckpt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match=f"CKPT: {message}"):
        read_weights(Path("weights.ckpt"), "CKPT")
    assert not Path("ran").exists()


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


class Wobbly(Frozen):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.freeze()


def test_stays_frozen_inside_a_training_parent() -> None:
    frozen = Wobbly()
    parent = nn.Sequential(frozen, nn.Dropout(0.5))
    inputs = torch.randn(8, 4)
    before = frozen.layers(inputs)
    parent.train()
    frozen.train()
    assert parent[1].training
    assert not any(module.training for module in frozen.modules())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert torch.equal(frozen.layers(inputs), before)
    torch.testing.assert_close(frozen.layers[1].running_mean, torch.zeros(4), rtol=0, atol=0)
    copied = copy.deepcopy(parent)
    assert copied[0] is frozen
    assert copied[1] is not parent[1]


@pytest.mark.parametrize("changed", [None, "weight", "buffer", "name", "shape"])
def test_digest_sees_a_change_but_not_mode_and_storage(changed: str | None) -> None:
    network = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4)).half()
    before = digest(network)
    network = network.float().eval().requires_grad_(False)
    if changed == "weight":
        network.get_parameter("0.weight").data[0, 0] += 1e-6
    elif changed == "buffer":
        network.get_buffer("1.running_mean")[0] += 1e-6
    elif changed == "name":
        network = nn.Sequential(OrderedDict(zip("ab", network.children(), strict=True)))
    elif changed == "shape":
        weight = network.get_parameter("0.weight")
        weight.data = weight.data.view(3, 4)
    assert (digest(network) == before) is (changed is None)
    assert len(before) == 64


def test_products_keep_the_results_of_mixed_precision() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Flatten(), nn.Linear(32, 4))
    images = torch.randn(2, 3, 4, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = network(images)
        keep_products_in(network, torch.bfloat16)
        assert torch.equal(network(images), before)
    kept = {name: weight.dtype for name, weight in network.named_parameters()}
    assert kept["0.weight"] == kept["4.bias"] == torch.bfloat16
    assert kept["1.weight"] == torch.float32
