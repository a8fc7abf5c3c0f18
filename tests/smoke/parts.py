"""Tiny parts for everything that a shipped YAML names: backbones of the same families, a prior, and images.

The backbones keep the input sizes and strides of the large ones, so that maps have as many locations, and those of
SwinV2 are channels last, as there. Images lie where `experiments/` expects them.
"""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from featinv_pl.nets.taef2 import AutoencoderTAEF2
from featinv_pl.tasks.pretraining import Classifier
from smoke.targets import PROJECT
from tiny import make_prior

CLASSES = ("n01440764", "n02102040", "n03000684")
NETWORKS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "resnet50": ("test_resnet", 224, {"channels": [8, 8, 8, 16]}),
    "convnext": ("test_convnext", 288, {"dims": [8, 8, 8, 16]}),
    "swinv2": (
        "swinv2_tiny_window8_256",
        384,
        {"img_size": 384, "window_size": 24, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]},
    ),
}
"""By the names of `experiments/imagenet/backbones`: a timm model, its input size and what makes it tiny."""

ACCUMULATED = {"12gb": 16, "24gb": 8, "80gb": 1}
"""Batches of a step, by the names of `experiments/imagenet/memory`."""


def make_parts(root: Path, networks: Sequence[str] = tuple(NETWORKS)) -> None:
    """Write networks, images and the overlays that name them below `root`, where each shipped file finds them."""
    (root / "experiments").symlink_to(PROJECT / "experiments")
    parts = root / "parts"
    make_prior(parts)
    overlays: dict[str, Any] = {}
    for name in networks:
        model, size, arguments = NETWORKS[name]
        torch.manual_seed(1)
        Classifier(model, 1000, size, arguments).save_pretrained(parts / name)
        given = {"backbone": f"parts/{name}"}
        overlays[f"extract-{name}"] = {"model": {"init_args": {**given, "autoencoder": "parts/prior"}}, **reading(8)}
        overlays[f"train-{name}"] = {
            "trainer": {"max_steps": 2, "val_check_interval": 2},
            "model": {"init_args": {**given, "prior": "parts/prior", "encoder": {"hidden_channels": 16}}},
            **reading(4),
        }
        corrupted = {"class_path": "FolderData", **reading(8)["data"]}
        overlays[f"corrupt-{name}"] = {
            **overlays[f"extract-{name}"],
            "data": {"init_args": {"data": corrupted, "severities": [3]}},
        }
    for name, accumulated in ACCUMULATED.items():
        overlays[name] = {"trainer": {"val_check_interval": accumulated}, **reading(16 // accumulated)}
    for name in ("digits", "digits-guidance"):
        overlays[f"sweep-{name}"] = {"base": [f"../experiments/sweeps/{name}.yaml", "../experiments/debug.yaml"]}
    callbacks = yaml.safe_load((root / "experiments/imagenet/test/robustness.yaml").read_text())["trainer"]["callbacks"]
    for callback in callbacks:  # published weights are not fetched
        options = callback.get("init_args", {})
        callback["init_args"] = {name: None if value == "download" else value for name, value in options.items()}
    overlays["test"] = {"trainer": {"callbacks": callbacks}}
    bench = {"backbone": "parts/convnext", "weights": "pretrained", "prior": "parts/prior"}
    overlays["bench"] = {
        "model": {"init_args": {**bench, "encoder": {"hidden_channels": 16}}},
        "data": {"init_args": {"feature_shape": [16, 9, 9], "batch_size": 2}},
    }
    for name, overlay in overlays.items():
        (parts / f"{name}.yaml").write_text(yaml.safe_dump(overlay))
    make_images(root / "data")
    make_photos(root)


def reading(batch_size: int) -> dict[str, Any]:
    """Settings of data that is read by the process itself."""
    return {"data": {"init_args": {"batch_size": batch_size, "num_workers": 0}}}


def make_images(data: Path) -> None:
    """A few images in each layout: ImageNet's, its variants', images without labels, CIFAR-10's, and a user's own."""
    folders = {f"imagenet/{split}/{wnid}": n for split, n in (("train", 6), ("val", 2)) for wnid in CLASSES}
    folders |= {f"imagenet-{variant}/{wnid}": 1 for variant in "ar" for wnid in CLASSES}
    folders |= {f"imagenet-c/{corruption}/3/{wnid}": 1 for corruption in ("fog", "contrast") for wnid in CLASSES}
    folders |= {"ood": 3}
    for folder, number in folders.items():
        size = (224, 224) if "imagenet-c" in folder else (330, 300)
        make_folder(data / folder, number, size, "JPEG")
    for split in ("train", "val", "test"):
        for label in range(10):
            make_folder(data / f"cifar10/{split}/class{label}", 2, (32, 32), "jpg")
    for label in range(10):
        make_folder(data / f"own/class{label}", 3, (80, 64), "jpg")


def make_photos(root: Path) -> None:
    """The archives and weights of the study of photos, with random ones, unpacked as its head says."""
    archives = root / "archives"
    for split, number in (("train", 13), ("val", 3)):
        for wnid in (*CLASSES, "n02123045"):  # two photos of each are a batch
            make_folder(archives / "photos" / split / wnid, number, (64, 64), "JPEG")
    for kind in ("style-transfer-preprocessed-512", "filled-silhouettes"):
        make_folder(archives / "shapes" / kind / "bear", 3, (224, 224), "png")
    for name, folder in (("tiny-imagenet-64px", "photos"), ("cue-conflict-224px", "shapes")):
        shutil.make_archive(str(archives / name), "zip", archives / folder)
    networks = {name: timm.create_model(name) for name in ("tf_efficientnet_lite0", "mobilenetv2_100")}
    for name, network in {**networks, "taef2": AutoencoderTAEF2()}.items():
        save_file(network.state_dict(), archives / f"{name}.safetensors")
    unpack = [sys.executable, "experiments/photos/unpack.py", "archives"]
    subprocess.run(unpack, cwd=root, check=True, stdout=subprocess.DEVNULL)


def make_folder(folder: Path, number: int, size: tuple[int, int], suffix: str) -> None:
    """Write images with some structure, of which each is another one."""
    folder.mkdir(parents=True)
    for index in range(number):
        noise = Image.effect_noise((size[0] // 8, size[1] // 8), 90).convert("RGB")
        noise.resize(size, Image.Resampling.BICUBIC).save(folder / f"{index}.{suffix}", "jpeg")
