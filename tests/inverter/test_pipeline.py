"""A model folder in three lines of Python, and folders that are refused."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from featinv_pl.errors import UserError
from featinv_pl.inverter.pipeline import FeatInvPipeline
from featinv_pl.nets.hub import SUMS


@pytest.fixture
def model(inverter_folder: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(inverter_folder, tmp_path / "model"))


def test_three_lines_of_python(inverter_folder: Path) -> None:
    pictures = [Image.effect_noise((size, 50), 60).convert(mode) for size, mode in ((40, "RGBA"), (60, "L"))]
    pipeline = FeatInvPipeline.from_pretrained(str(inverter_folder))
    several = pipeline(pictures, num_samples=2)
    assert [len(samples) for samples in several] == [2, 2]
    assert several[0][0].size == (32, 32)
    [alone] = pipeline(pictures[1], num_samples=1)
    # Neither batch nor number of samples matters, but for rounding: sums are ordered differently in other batches.
    assert np.abs(np.asarray(alone[0], int) - np.asarray(several[1][0], int)).max() <= 1
    assert np.abs(np.asarray(several[0][0], int) - np.asarray(several[0][1], int)).max() > 1
    [[from_map]] = pipeline(pipeline.classify(pipeline.crop([pictures[1]]))["features"])
    assert from_map.tobytes() == alone[0].tobytes()


def test_sampler_can_be_changed_and_mixed_precision_is_not_saved(inverter_folder: Path) -> None:
    pipeline = FeatInvPipeline.from_pretrained(inverter_folder)
    features = torch.randn(pipeline.inverter.classifier.feature_shape)
    before = pipeline.reconstruct(features)
    assert torch.equal(before, pipeline.reconstruct(features))
    assert not torch.equal(before, pipeline.reconstruct(features, seed=1))
    assert not torch.equal(before, pipeline.with_sampler(steps=3, guidance_scale=2.0).reconstruct(features))
    with pytest.raises(UserError, match=r"The map has the shape \(3, 4, 4\); this inverter reads \(8, 4, 4\)"):
        pipeline.reconstruct(torch.zeros(3, 4, 4))
    pipeline.to("cpu", torch.bfloat16)
    assert pipeline.inverter.prior.unet.conv_in.weight.dtype == torch.bfloat16
    with pytest.raises(UserError, match="Save one in full precision"):
        pipeline.save_pretrained(Path("again"))
    assert not Path("again").exists()


INDEX, CONTROL, CLASSIFIER = "model_index.json", "controlnet/diffusion_pytorch_model.safetensors", "model.safetensors"


def without_a_bias(path: Path) -> None:
    save_file({name: value for name, value in load_file(path).items() if name != "conv_in.bias"}, path)


def with_other_weights(path: Path) -> None:
    save_file({name: value + 1 for name, value in load_file(path).items()}, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (INDEX, Path.unlink, "there is no file '.*/model_index.json'"),
        (INDEX, lambda path: path.write_text("{}"), "model_index.json' is damaged"),
        ("encoder", shutil.rmtree, "there is no file '.*encoder/diffusion_pytorch_model.safetensors'"),
        (CONTROL, without_a_bias, "1 tensors of the controlnet in '.*model' are missing"),
        (f"backbone/{CLASSIFIER}", with_other_weights, r"are not those that its control was trained with \(backbone: "),
    ],
)
def test_refuses_a_model(name: str, damage: Callable[[Path], object], message: str, model: Path) -> None:
    (model / SUMS).unlink()  # as in older folders
    damage(model / name)
    with pytest.raises(UserError, match=message):
        FeatInvPipeline.from_pretrained(model)


def test_every_change_of_a_model_is_noticed(model: Path) -> None:
    """Except of its card, which its author may edit; `sha256sum` reads the same file."""
    (model / "README.md").write_text("Another card")
    (model / ".gitattributes").write_text("what a hub adds")
    subprocess.run(["sha256sum", "--check", "--quiet", SUMS], cwd=model, check=True)
    FeatInvPipeline.from_pretrained(model)
    (model / "encoder" / "more.json").write_text("{}")
    with pytest.raises(UserError, match=r"1 files of .* such as 'encoder/more.json'. Copy the folder"):
        FeatInvPipeline.from_pretrained(model)
