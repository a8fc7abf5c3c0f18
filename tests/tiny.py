"""Tiny real networks, by the classes that users make theirs with, and configurations that run on them."""

import contextlib
from pathlib import Path
from typing import Any

import torch
import yaml

from featinv_pl.__main__ import main
from featinv_pl.inverter.inverter import Inverter
from featinv_pl.inverter.pipeline import FeatInvPipeline
from featinv_pl.nets.backbone import Backbone
from featinv_pl.nets.control import Encoder
from featinv_pl.nets.prior import Prior
from featinv_pl.sampling.sampler import Sampler
from featinv_pl.tasks.pretraining import Autoencoder, Classifier, NoisePredictor

ROOT = Path(__file__).parents[1]
TRAINER: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_model_summary": False}
TRAINER["num_sanity_val_steps"] = 0


def write(path: Path, settings: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def extraction(classifier: Path, prior: Path, sources: list[str]) -> dict[str, Any]:
    writer = {"class_path": "ShardWriter", "init_args": {"shard_size": 30}}
    frozen = {"backbone": str(classifier), "autoencoder": str(prior / "vae"), "image_size": 32}
    return {
        "trainer": {**TRAINER, "default_root_dir": "shards", "callbacks": [writer], "limit_predict_batches": 2},
        "model": {"class_path": "FeatureExtraction", "init_args": frozen},
        "data": {"class_path": "DigitsData", "init_args": {"sources": sources, "batch_size": 30}},
    }


def inversion(classifier: Path, prior: Path, shards: Path = Path("shards")) -> dict[str, Any]:
    callbacks = [
        {"class_path": "ModelCheckpoint", "init_args": {"filename": "inversion"}},
        {"class_path": "Evaluation", "init_args": {"num_images": 3}},
    ]
    run: dict[str, Any] = {"default_root_dir": "run", "max_steps": 2, "val_check_interval": 2, "callbacks": callbacks}
    model: dict[str, Any] = {"backbone": str(classifier), "prior": str(prior), "image_size": 32}
    model |= {"encoder": {"hidden_channels": 8}, "sampler": {"steps": 2}}
    sets = {name: str(shards / name) for name in ("train", "val", "clean", "corrupted")}
    data: dict[str, Any] = {"train": sets.pop("train"), "val": sets.pop("val"), "test": sets, "batch_size": 16}
    return {
        "seed_everything": 0,
        "trainer": {**TRAINER, **run},
        "model": {"class_path": "FeatureInversion", "init_args": model},
        "data": {"class_path": "FeatureShards", "init_args": data},
    }


def short(classifier_folder: Path, prior_folder: Path, shards: Path) -> dict[str, Any]:
    settings = inversion(classifier_folder, prior_folder, shards)
    saver = {"filename": "inversion", "every_n_train_steps": 2, "enable_version_counter": False}
    settings["trainer"] |= {
        "max_steps": 5,
        "check_val_every_n_epoch": None,
        "limit_val_batches": 2,
        "enable_progress_bar": False,
        "callbacks": [
            {"class_path": "MovingAverage", "init_args": {"decay": 0.5}},
            {"class_path": "ModelCheckpoint", "init_args": saver},
        ],
    }
    settings["data"]["init_args"] |= {"batch_size": 16, "test": {}}
    return settings


def joined(document: dict[str, Any]) -> dict[str, float]:
    """The scores of a `metrics.json` under the names that loggers know them by."""
    return {
        f"{source}/{score}" if arm == "inversion" else f"{source}/{score}.{arm}": found["value"]
        for source, arms in document["scores"].items()
        for arm, scores in arms.items()
        for score, found in scores.items()
    }


def make_classifier(root: Path) -> Path:
    """The folder of a backbone."""
    torch.manual_seed(1)
    model = Classifier("test_resnet", 10, 32, {"output_stride": 8, "channels": [8, 8, 8, 8]})
    model.save_pretrained(root / "classifier")
    return root / "classifier"


def make_prior(root: Path) -> Path:
    """The folder of a prior, whose autoencoder is in `vae` below it."""
    torch.manual_seed(2)
    vae: dict[str, Any] = {"block_out_channels": [4, 4, 4, 8], "down_block_types": ["DownEncoderBlock2D"] * 4}
    vae |= {"up_block_types": ["UpDecoderBlock2D"] * 4}
    sizes = {"latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 32}
    Autoencoder({**vae, **sizes}).save_pretrained(root / "autoencoder")
    unet: dict[str, Any] = {"sample_size": 4, "block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4}
    unet |= {"cross_attention_dim": 8, "attention_head_dim": 2}
    unet |= {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"]}
    unet |= {"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]}
    NoisePredictor(str(root / "autoencoder"), unet).save_pretrained(root / "prior")
    return root / "prior"


def make_inverter(folder: Path, classifier: Path, prior: Path) -> None:
    """Write a model folder. Its control is random: one that is new would ignore the map."""
    sampler = Sampler(steps=2, guidance_scale=1.0)
    inverter = Inverter(Backbone(str(classifier)), Prior(str(prior)), Encoder(8), image_size=32, sampler=sampler)
    torch.manual_seed(3)
    for weight in inverter.control.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    FeatInvPipeline(inverter).save_pretrained(folder)


def extract_digits(folder: Path, classifier: Path, prior: Path) -> Path:
    """Write shard sets `train` and `clean`, of 48 digits each, and return the folder that they are in."""
    with contextlib.chdir(folder):
        config = ["--config", str(ROOT / "experiments/digits/extract.yaml")]
        config += ["--config", str(ROOT / "experiments/debug.yaml"), "--data.batch_size=24"]
        frozen = ["--model.backbone", str(classifier), "--model.autoencoder", str(prior / "vae")]
        main(["predict", *config, "--data.sources", "[train,clean]", "--trainer.logger=false", *frozen])
    return folder / "runs/demo/shards"
