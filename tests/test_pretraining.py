"""Frozen parts of one's own, from folders of images, through the public command."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from conftest import MakeBatch
from featinv_pl.__main__ import main
from featinv_pl.data.digits import DigitImages
from featinv_pl.data.folders import FolderImages
from featinv_pl.data.images import collate_images
from featinv_pl.nets.autoencoder import LatentAutoencoder
from featinv_pl.nets.backbone import Backbone
from featinv_pl.nets.prior import Prior
from featinv_pl.pretraining import Autoencoder, Classifier, NoisePredictor

AUTOENCODER = {
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
}
UNET = {
    "block_out_channels": [8, 8],
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 8,
    "norm_num_groups": 4,
}


@pytest.fixture
def images() -> Path:
    """Two classes: dark and light."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name, mean in (("dark", 60), ("light", 190)):
            folder = Path("images") / split / name
            folder.mkdir(parents=True)
            for number in range(8):
                pixels = rng.normal(mean, 10, (20, 24, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return Path("images")


def fit(name: str, images: Path, steps: int = 4, **init_args: Any) -> None:
    """`featinv-pl fit`, saving to a folder of the class's name."""
    settings = {
        "trainer": {
            "accelerator": "cpu",
            "max_steps": steps,
            "logger": False,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "callbacks": [{"class_path": "SavePretrained", "init_args": {"folder": name.lower()}}],
        },
        "model": {"class_path": name, "init_args": init_args},
        "data": {
            "class_path": "FolderData",
            "init_args": {
                "train": str(images / "train"),
                "val": str(images / "val"),
                "image_size": 16,
                "batch_size": 8,
                "num_workers": 1,
            },
        },
    }
    Path(f"{name}.yaml").write_text(yaml.safe_dump(settings))
    main(["fit", "--config", f"{name}.yaml"])


def test_parts_of_ones_own_load_as_backbone_and_prior(images: Path) -> None:
    adam = {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.003}}
    fit(
        "Classifier",
        images,
        steps=240,
        model="test_resnet",
        num_classes=2,
        image_size=16,
        model_args={"output_stride": 8, "channels": [8, 8, 8, 8]},
        optimizer=adam,
    )
    backbone = Backbone("classifier")
    assert backbone.feature_shape == (8, 2, 2)
    assert backbone.input_size == (16, 16)
    found = FolderImages(images / "val", "val", 16)
    seen = collate_images([found[index] for index in range(len(found))])
    assert torch.equal(backbone(seen["images"])[1].argmax(1), seen["labels"])

    fit("Autoencoder", images, config=AUTOENCODER)
    fit("NoisePredictor", images, autoencoder="autoencoder", config=UNET, prediction_type="v_prediction")
    assert sorted(path.name for path in Path("noisepredictor").iterdir()) == [
        "prompts.safetensors",
        "scheduler",
        "unet",
        "vae",
    ]
    prior = Prior("noisepredictor")
    assert prior.schedule.config.prediction_type == "v_prediction"
    assert prior.autoencoder.latent_channels == 4
    assert not list(Path().rglob("*.bin"))


def test_saving_again_replaces_the_folder_whole(images: Path) -> None:
    Path("autoencoder").mkdir()
    Path("autoencoder/config.json").touch()
    Path("autoencoder/stale").touch()
    fit("Autoencoder", images, steps=1, config=AUTOENCODER)
    assert not Path("autoencoder/stale").exists()
    assert not Path("autoencoder.partial").exists()


def test_a_folder_of_something_else_is_never_replaced(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("autoencoder").mkdir()
    Path("autoencoder/thesis.txt").write_text("years of work")
    with pytest.raises(SystemExit):
        fit("Autoencoder", images, steps=1, config=AUTOENCODER)
    assert "'autoencoder' exists and is no saved model" in capsys.readouterr().err
    assert Path("autoencoder/thesis.txt").read_text() == "years of work"


def test_the_scaling_factor_gives_latents_unit_variance() -> None:
    torch.manual_seed(0)
    model = Autoencoder(AUTOENCODER)
    images = torch.stack([DigitImages("val")[index]["images"] for index in range(32)])
    batch: Any = {"images": images, "key": [str(index) for index in range(32)]}
    for step in range(500):
        model.losses(batch, (step,))
    model.save_pretrained(Path("vae"))
    autoencoder = LatentAutoencoder.load("vae")
    moments = autoencoder.encode(images)
    latents = autoencoder.sample(moments, torch.randn(32, 4, 16, 16))
    assert latents.var().item() == pytest.approx(1, abs=0.05)
    assert json.loads(Path("vae/config.json").read_text())["scaling_factor"] != 0.18215


def test_losses_fall() -> None:
    torch.manual_seed(0)
    images = torch.stack([DigitImages("train")[index]["images"] for index in range(16)])
    batch: Any = {"images": images, "labels": torch.arange(16) % 4, "key": [str(index) for index in range(16)]}
    Autoencoder(AUTOENCODER).save_pretrained(Path("vae"))
    for model in (
        Classifier("test_resnet", 4, 32, {"channels": [8, 8, 8, 8]}),
        Autoencoder(AUTOENCODER),
        NoisePredictor("vae", UNET),
    ):
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        losses = []
        for _ in range(30):
            loss = model.losses(batch, (0,))["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0], type(model).__name__


def test_prior_knows_its_prompt_and_the_empty_one(prior_folder: Path, make_batch: MakeBatch, tmp_path: Path) -> None:
    """A tenth of training goes without the prompt, which the folder then holds."""
    model = NoisePredictor(str(prior_folder / "vae"), UNET)
    seen: list[torch.Tensor] = []
    model.unet.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2]))
    images: Any = make_batch(1000)
    with torch.no_grad():
        model.losses(images, (0, "test"))
    [prompts] = seen
    empty = (prompts == 0).flatten(1).all(1)
    assert 0.07 < empty.float().mean() < 0.13
    model.save_pretrained(tmp_path / "prior")
    prior = Prior(str(tmp_path / "prior"))
    assert torch.equal(prompts[~empty][0], prior.prompt)
    assert prior.empty.abs().max() == 0
    assert prior.prompt.std() > 0.5
