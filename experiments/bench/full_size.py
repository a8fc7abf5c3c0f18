"""The full-size model with random weights: what it costs on this machine, and that all of it works.

`make full-size` writes a prior of Stable Diffusion's size in diffusers' layout to a
temporary folder. For each backbone of the paper, in a process of its own, it then trains one step, saves
a checkpoint, reloads it into a new model, and samples an image in two steps. On a GPU it does so in bf16.
`--short` does the same with a tiny prior.
"""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader

from featinv_pl.nets.frozen import digest
from featinv_pl.nets.prior import LENGTH, PROMPTS, write_prompts
from featinv_pl.nets.supported import SCHEDULE
from featinv_pl.sampling.sampler import Sampler
from featinv_pl.tasks.inversion import FeatureInversion
from tiny import make_prior

BACKBONES = Path(__file__).parents[1] / "imagenet" / "backbones"
GIB = 2**30


def write_prior(folder: Path) -> None:
    """Stable Diffusion 1 at 256 pixels, as MiniSD is, with random weights."""
    unet = UNet2DConditionModel(sample_size=32, cross_attention_dim=768)  # the rest is diffusers' default
    unet.save_pretrained(folder / "unet")
    vae = AutoencoderKL(
        block_out_channels=[128, 256, 512, 512],
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2,
        sample_size=256,
    )
    vae.save_pretrained(folder / "vae")
    DDIMScheduler(**SCHEDULE).save_pretrained(folder / "scheduler")
    write_prompts(folder / PROMPTS, torch.randn(LENGTH, 768), torch.randn(LENGTH, 768))


def run(backbone: str, folder: Path) -> dict[str, Any]:
    """Train one step, save, reload, sample; the folder holds the prior and gets the checkpoint."""
    seconds: dict[str, float] = {}
    options = yaml.safe_load((BACKBONES / f"{backbone}.yaml").read_text())["model"]["init_args"]
    gpu = torch.cuda.is_available()

    def make() -> FeatureInversion:
        torch.manual_seed(0)  # a random backbone must come out the same to be taken for the same
        sampler = Sampler("ddim", steps=2)
        return FeatureInversion(**options, weights="random", prior=str(folder), sampler=sampler)

    with timed(seconds, "build"):
        model = make()
    trainer = Trainer(
        max_steps=1,
        accelerator="gpu" if gpu else "cpu",
        devices=1,
        precision="bf16-mixed" if gpu else "32-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    features = torch.randn(model.inverter.classifier.feature_shape)
    latents = torch.randn(8, 32, 32)
    sample = {"features": features, "moments": latents, "key": "random"}
    with timed(seconds, "fit of one step"):
        trainer.fit(model, DataLoader([sample], batch_size=1))  # type: ignore[arg-type]
    with timed(seconds, "checkpoint"):
        trainer.save_checkpoint(folder / "last.ckpt")
    trained = digest(model.inverter.control)
    counts = {name: millions(part) for name, part in parts(model).items()}
    shape = model.inverter.classifier.feature_shape
    del model, trainer

    with timed(seconds, "reload"):
        model = make()
        state = torch.load(folder / "last.ckpt", map_location="cpu", weights_only=True, mmap=True)
        model.on_load_checkpoint(state)
        model.load_state_dict(state["state_dict"])
        assert digest(model.inverter.control) == trained
    model.to("cuda" if gpu else "cpu")
    device = model.device
    with timed(seconds, "two DDIM steps"), torch.autocast(device.type, torch.bfloat16, enabled=gpu):
        images = model.inverter.reconstruct_from(features[None].to(device), torch.randn(1, 4, 32, 32, device=device))
        assert images.shape == (1, 3, 256, 256)
        assert images.isfinite().all()
    (folder / "last.ckpt").unlink()
    return {
        "maps": "x".join(map(str, shape)),
        "parameters (M)": counts,
        "seconds": seconds,
        "peak memory (GiB)": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB,
        "peak GPU memory (GiB)": torch.cuda.max_memory_allocated() / GIB if gpu else None,
    }


def parts(model: FeatureInversion) -> dict[str, nn.Module]:
    """What is counted."""
    return {
        "UNet": model.inverter.prior.unet,
        "autoencoder": model.inverter.prior.autoencoder,
        "backbone": model.inverter.classifier,
        "ControlNet": model.inverter.control.controlnet,
        "feature encoder": model.inverter.control.encoder,
    }


def millions(module: nn.Module) -> float:
    """Parameters, in millions."""
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Note how long something takes."""
    start = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds[name] = time.perf_counter() - start


def main() -> None:
    """Print the table; `main` starts itself again for each backbone, so that peaks are each one's own."""
    short = sys.argv[1:] == ["--short"]
    if len(sys.argv) == 3:
        print(json.dumps(run(sys.argv[1], Path(sys.argv[2]))))
        return
    device = torch.cuda.get_device_name() + ", bf16" if torch.cuda.is_available() else "CPU, fp32"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {device}, batch size 1")
    with TemporaryDirectory() as folder:
        print(f"writing a prior with random weights to {folder} ...", flush=True)
        make_prior(Path(folder)) if short else write_prior(Path(folder) / "prior")
        for backbone in ("resnet50", "convnext", "swinv2"):
            command = [sys.executable, "-m", "bench.full_size", backbone, f"{folder}/prior"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            result = json.loads(done.stdout.splitlines()[-1])
            print(f"{backbone}, maps of {result['maps']}")
            print("  M parameters: " + ", ".join(f"{name} {n:.1f}" for name, n in result["parameters (M)"].items()))
            print("  seconds:      " + ", ".join(f"{name} {n:.1f}" for name, n in result["seconds"].items()))
            gpu = result["peak GPU memory (GiB)"]
            print(f"  peak memory:  {result['peak memory (GiB)']:.1f} GiB", end="")
            print(f", {gpu:.1f} GiB on the GPU" if gpu is not None else "", flush=True)


if __name__ == "__main__":
    main()
