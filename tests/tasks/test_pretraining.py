"""Frozen parts of one's own, from folders of images, through the public command."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image
from safetensors.torch import save_file

from conftest import MakeBatch
from featinv_pl.__main__ import main
from featinv_pl.data.images.datamodule import FolderData
from featinv_pl.data.images.digits import DigitImages
from featinv_pl.data.images.sources import FolderImages, ImageBatches
from featinv_pl.data.shards.datamodule import FeatureShards
from featinv_pl.data.shards.manifest import read_manifest
from featinv_pl.errors import UserError
from featinv_pl.nets.autoencoder import LatentAutoencoder
from featinv_pl.nets.backbone import Backbone
from featinv_pl.nets.prior import Prior
from featinv_pl.nets.taef2 import AutoencoderTAEF2
from featinv_pl.tasks.pretraining import Autoencoder, Classifier, NoisePredictor
from featinv_pl.types import from_uint8
from interrupts import Capture
from test_cli import files
from tiny import TRAINER, write

WNIDS = ("n01440764", "n02102040", "n03028079")

AUTOENCODER = {
    **{"block_out_channels": [8, 8], "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 4},
    **{"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2},
    "mid_block_add_attention": False,
}
UNET = {
    **{"block_out_channels": [8, 8], "layers_per_block": 1, "cross_attention_dim": 8, "norm_num_groups": 4},
    **{"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2},
}


@pytest.fixture
def images() -> Path:
    """Three classes of Imagenette, of which validation lacks the first: dark, grey and light."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name, mean in list(zip(WNIDS, (40, 125, 210), strict=True))[split == "val" :]:
            folder = Path("images") / split / name
            folder.mkdir(parents=True)
            for number in range(8):
                pixels = rng.normal(mean, 10, (20, 24, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return Path("images")


def fit(name: str, images: Path, steps: int = 4, options: tuple[str, ...] = (), **init_args: Any) -> None:
    """`featinv-pl fit`, saving to a folder of the class's name."""
    saving = {"class_path": "SavePretrained", "init_args": {"folder": name.lower()}}
    folders = {"train": str(images / "train"), "val": str(images / "val"), "image_size": 16, "batch_size": 8}
    settings = {
        "trainer": {**TRAINER, "max_steps": steps, "enable_checkpointing": False, "callbacks": [saving]},
        "model": {"class_path": name, "init_args": init_args},
        "data": {"class_path": "FolderData", "init_args": {**folders, "num_workers": 0}},
    }
    main(["fit", "--config", write(Path(f"{name}.yaml"), settings), *options])


def extract(name: str, images: Path, **init_args: Any) -> None:
    """`featinv-pl predict` of the validation images, to a folder of the model's name."""
    parts = {"backbone": "classifier", "autoencoder": "autoencoder", "image_size": 16}
    folders = {"predict": {"val": str(images / "val")}, "image_size": 16, "batch_size": 16}
    settings: dict[str, Any] = {
        "trainer": {**TRAINER, "default_root_dir": name, "callbacks": [{"class_path": "ShardWriter"}]},
        "model": {"class_path": name, "init_args": {**parts, **init_args}},
        "data": {"class_path": "FolderData", "init_args": folders},
    }
    main(["predict", "--config", write(Path(f"{name}.yaml"), settings)])


def test_parts_of_ones_own_load_as_backbone_and_prior(images: Path) -> None:
    adam = {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.01}}
    small = {"output_stride": 8, "channels": [8, 8, 8, 8]}
    fit("Classifier", images, 40, model="test_resnet", num_classes=3, image_size=16, model_args=small, optimizer=adam)
    backbone = Backbone("classifier")
    assert backbone.feature_shape == (8, 2, 2)
    assert backbone.input_size == (16, 16)
    assert backbone.classes.labels == {name: label for label, name in enumerate(WNIDS)}
    found = FolderImages(images / "val", "val", 16, classes=WNIDS)
    seen = ImageBatches(found)[range(len(found))]
    assert torch.equal(backbone(from_uint8(seen["images"]))[1].argmax(1), seen["labels"])
    assert set(seen["labels"].tolist()) == {1, 2}

    fit("Autoencoder", images, config=AUTOENCODER)
    for name, more in (
        ("FeatureExtraction", {}),
        ("AdversarialExtraction", {"attack": {"epsilon": 90, "step": 10, "steps": 10}}),
    ):
        extract(name, images, **more)
        manifest = read_manifest(Path(name, "val"), "")
        assert manifest["settings"]["classes"] == {WNIDS[1]: 1, WNIDS[2]: 2}
        ((batch,),) = FeatureShards(val=Path(name, "val")).val_dataloader()
        assert [WNIDS[label] for label in batch["labels"].tolist()] == [key.split("/")[0] for key in batch["key"]]
        # Attacked, all are missed; had they been attacked from labels of their own, as many would be kept.
        kept = (batch["logits"].argmax(1) == batch["labels"]).float().mean()
        assert kept == (1 if name == "FeatureExtraction" else pytest.approx(0, abs=0.5))

    fit("NoisePredictor", images, autoencoder="autoencoder", config=UNET, prediction_type="v_prediction")
    parts = {"SHA256SUMS", "prompts.safetensors", "scheduler", "unet", "vae"}
    assert {path.name for path in Path("noisepredictor").iterdir()} == parts
    prior = Prior("noisepredictor")
    assert prior.schedule.config.prediction_type == "v_prediction"
    assert prior.autoencoder.latent_channels == 4
    assert not list(Path().rglob("*.bin"))


def test_a_classifier_refuses_classes_that_are_not_its_own(images: Path, capsys: Capture) -> None:
    def refused(**changes: Any) -> str:
        with pytest.raises(SystemExit):
            fit("Classifier", images, 1, **{"model": "test_resnet", "num_classes": 3, "image_size": 16, **changes})
        return capsys.readouterr().err

    assert "model.num_classes is 10, and the images to train on have 3 classes (n01440764, " in refused(num_classes=10)
    (images / "val" / WNIDS[1]).rename(images / "val/n99999999")
    assert re.search(r"`?data\.val`?: 'n99999999/\d\.png' is not of any class of training", refused())
    model = Classifier("test_resnet", 3, 16)
    model.on_load_checkpoint({"classes": list(WNIDS[::-1])})
    trainer: Any = Trainer(accelerator="cpu", logger=False)
    trainer.datamodule, model.trainer = FolderData(images / "train"), trainer
    with pytest.raises(UserError, match=r"`data\.train`: the images have the classes n01440764, .* and the checkpoint"):
        model.on_fit_start()


def test_a_model_is_replaced_by_its_own_training_alone(images: Path, capsys: Capture) -> None:
    def refused(message: str, *options: str) -> None:
        with pytest.raises(SystemExit):
            fit("Autoencoder", images, 2, options, config=AUTOENCODER)
        assert message in capsys.readouterr().err

    folder, weights = Path("autoencoder"), Path("autoencoder/diffusion_pytorch_model.safetensors")
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    refused("'autoencoder' holds what SavePretrained has not written")
    assert files(folder) == {"config.json": b"{}"}
    (folder / "config.json").unlink()
    saving = ("--trainer.enable_checkpointing=true",)
    fit("Autoencoder", images, 1, saving, config=AUTOENCODER)
    first = weights.read_bytes()
    [checkpoint] = map(str, Path().glob("*.ckpt"))
    refused("'autoencoder' is the model of an earlier training", "--trainer.default_root_dir=other")
    continued = (*saving, "--ckpt_path", checkpoint)

    (folder / "thesis.txt").write_text("years of work")  # beside a config.json
    refused("'autoencoder' holds what SavePretrained has not written", *continued)
    (folder / "thesis.txt").rename("thesis.txt")
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    refused("or what was changed since", *continued)
    (folder / "config.json").write_text((folder / "config.json").read_text()[:-1])
    assert weights.read_bytes() == first

    fit("Autoencoder", images, 2, continued, config=AUTOENCODER)
    assert weights.read_bytes() != first
    assert sorted(path.name for path in Path().glob("*autoencoder*")) == ["autoencoder"]


def test_a_kill_while_a_model_is_replaced_leaves_one(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saving = ("--trainer.enable_checkpointing=true", "--trainer.default_root_dir=run")
    fit("Autoencoder", images, 1, saving, config=AUTOENCODER)
    first = files(Path("autoencoder"))
    replace = os.replace

    def killed(source: Path, target: Path) -> None:
        replace(source, target)
        if Path(source).name == "autoencoder":
            raise KeyboardInterrupt

    continued = (*saving, "--ckpt_path=last")
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(SystemExit):
        fit("Autoencoder", images, 2, continued, config=AUTOENCODER)
    monkeypatch.setattr(os, "replace", replace)
    assert not Path("autoencoder").exists()
    with pytest.raises(SystemExit):  # the next run puts it back, and this one has no leave to replace it
        fit("Autoencoder", images, 1, ("--trainer.default_root_dir=other",), config=AUTOENCODER)
    assert files(Path("autoencoder")) == first
    fit("Autoencoder", images, 3, continued, config=AUTOENCODER)
    assert files(Path("autoencoder")) != first


def test_a_trained_autoencoder_normalises_each_channel_of_its_latents() -> None:
    torch.manual_seed(0)
    model = Autoencoder(AUTOENCODER)
    images = from_uint8(torch.stack([DigitImages("val")[index].images for index in range(6)]))[..., 8:24, 8:24]
    batch: Any = {"images": images, "key": [str(index) for index in range(6)]}
    with torch.no_grad():
        for step in range(350):
            model.losses(batch, (step,))
    model.save_pretrained(Path("vae"))
    autoencoder = LatentAutoencoder.load("vae")
    moments = autoencoder.encode(images)
    latents = autoencoder.sample(moments, torch.randn(6, 4, 8, 8))
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=0.15, rtol=0)
    torch.testing.assert_close(latents.var((0, 2, 3)), torch.ones(4), atol=0.15, rtol=0)


def test_latents_of_taef2_are_measured_once_and_saved_with_the_prior(images: Path) -> None:
    torch.manual_seed(0)
    save_file(AutoencoderTAEF2().state_dict(), "taef2.safetensors")
    settings = {"autoencoder": "taef2.safetensors", "config": UNET}
    saving = ("--trainer.enable_checkpointing=true", "--trainer.default_root_dir=run")
    fit("NoisePredictor", images, 3, saving, **settings)
    shown = from_uint8(torch.stack([FolderImages(images / "train", "train", 16)[index].images for index in range(24)]))
    autoencoder = Prior("noisepredictor").autoencoder
    latents = autoencoder.sample(autoencoder.encode(shown), torch.zeros(24, 32, 2, 2))
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(32), atol=1e-3, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3), correction=0), torch.ones(32), atol=1e-3, rtol=0)

    first = Path("noisepredictor/vae/config.json").read_bytes()
    shutil.rmtree(images / "train" / WNIDS[0])  # a resumed run keeps what it was trained with
    fit("NoisePredictor", images, 4, (*saving, "--ckpt_path=last"), **settings)
    assert Path("noisepredictor/vae/config.json").read_bytes() == first


def test_a_prior_is_trained_on_the_latents_of_shards(shards: Path, prior_folder: Path) -> None:
    """With the loss of the images that they were encoded from, but for half precision."""
    model = NoisePredictor(str(prior_folder / "vae"), UNET)
    stored: Any = next(iter(FeatureShards(val=shards / "val").val_dataloader()[0]))
    stored = FeatureShards().on_after_batch_transfer(stored, 0)
    with torch.no_grad():
        from_shards = model.losses(stored, (0,))["loss"]
        alone: Any = {"images": stored["images"], "key": stored["key"]}
        from_images = model.losses(alone, (0,))["loss"]
    torch.testing.assert_close(from_shards, from_images, rtol=2e-3, atol=0)

    data = {"train": str(shards / "train"), "val": str(shards / "val"), "batch_size": 4}
    saving = {"class_path": "SavePretrained", "init_args": {"folder": "prior"}}
    settings: dict[str, Any] = {
        "trainer": {**TRAINER, "max_steps": 2, "enable_checkpointing": False, "callbacks": [saving]},
        "model": {
            "class_path": "NoisePredictor",
            "init_args": {"autoencoder": str(prior_folder / "vae"), "config": UNET},
        },
        "data": {"class_path": "FeatureShards", "init_args": data},
    }
    main(["fit", "--config", write(Path("prior.yaml"), settings)])
    assert Prior("prior").autoencoder.normalisation == LatentAutoencoder.load(str(prior_folder)).normalisation

    torch.manual_seed(1)
    Autoencoder(AUTOENCODER).save_pretrained(Path("other"))
    settings["model"]["init_args"]["autoencoder"] = "other"
    with pytest.raises(SystemExit):
        main(["fit", "--config", write(Path("other.yaml"), settings)])


def test_losses_fall() -> None:
    torch.manual_seed(0)
    images = from_uint8(torch.stack([DigitImages("train")[index].images for index in range(16)]))
    batch: Any = {"images": images, "labels": torch.arange(16) % 4, "key": [str(index) for index in range(16)]}
    Autoencoder(AUTOENCODER).save_pretrained(Path("vae"))
    for model in (
        Classifier("test_resnet", 4, 32, {"channels": [8, 8, 8, 8]}),
        Autoencoder(AUTOENCODER),
        NoisePredictor("vae", UNET),
    ):
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(15):
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
