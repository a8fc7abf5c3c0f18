"""How fast shards are written and read, as ratios to what bounds them on this machine: `make bench-data`."""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity

from featinv_pl.__main__ import main
from featinv_pl.data.images.datamodule import FolderData
from featinv_pl.data.shards.datamodule import FeatureShards
from featinv_pl.data.shards.manifest import Settings
from featinv_pl.data.shards.samples import ImageFormat, Storage, quantise
from featinv_pl.data.shards.writer import ShardSetWriter
from featinv_pl.tasks.extraction import FeatureExtraction
from featinv_pl.tasks.pretraining import Autoencoder, Classifier
from featinv_pl.types import Batch
from shard_sets import provenance_of, settings_of

IMAGE_SIZE, BATCH_SIZE, REPEATS = 224, 16, 3
SHARD_SIZE, READ_BATCH = 250, 64
STORED = 3  # batches whose maps are stored and compared
EXTRACTION = """
num_threads: 1
trainer:
  accelerator: cpu
  logger: false
  enable_model_summary: false
  enable_progress_bar: false
  default_root_dir: {root}/run
  callbacks:
  - {{class_path: ShardWriter, init_args: {{shard_size: 64}}}}
  - {{class_path: {stopwatch}.Stopwatch}}
model:
  class_path: FeatureExtraction
  init_args: {{backbone: {root}/resnet50, autoencoder: {root}/vae, image_size: {size}}}
data:
  class_path: FolderData
  init_args: {{predict: {{bench: {root}/images}}, image_size: {size}, batch_size: {batch}, num_workers: 1}}
"""


class Stopwatch(Callback):
    """Seconds from the first batch to the last byte."""

    seconds = 0.0

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        Stopwatch.seconds = -time.perf_counter()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        Stopwatch.seconds += time.perf_counter()


def make_photographs(folder: Path, number: int) -> None:
    """JPEGs of ImageNet's usual size and of about its usual detail."""
    folder.mkdir()
    for index in range(number):
        image = Image.effect_noise((125, 94), 60).convert("RGB").resize((500, 375), Image.Resampling.BICUBIC)
        image.save(folder / f"{index:04d}.jpg", quality=90)


def make_networks(folder: Path) -> None:
    """A ResNet50, and an autoencoder so small that the classifier is what takes the time."""
    torch.manual_seed(0)
    Classifier("resnet50", 1000, IMAGE_SIZE).save_pretrained(folder / "resnet50")
    autoencoder = {
        "block_out_channels": [4, 4, 4, 8],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 1,
        "norm_num_groups": 4,
    }
    Autoencoder(autoencoder).save_pretrained(folder / "vae")


def bench_extraction(root: Path, images: int) -> list[str]:
    """Extraction by the public command, against the networks alone on batches in memory."""
    make_photographs(root / "images", images)
    make_networks(root)
    networks = FeatureExtraction(str(root / "resnet50"), str(root / "vae"), IMAGE_SIZE).eval()
    data = FolderData(predict={"bench": root / "images"}, image_size=IMAGE_SIZE, batch_size=BATCH_SIZE)
    batches = [data.on_after_batch_transfer(batch, 0) for batch in data.predict_dataloader()[0]]
    settings = yaml.safe_load(EXTRACTION.format(root=root, size=IMAGE_SIZE, batch=BATCH_SIZE, stopwatch=__name__))

    def extract(repeat: int) -> float:
        settings["trainer"]["callbacks"][0]["init_args"]["folder"] = str(root / f"shards-{repeat}")
        (root / "extract.yaml").write_text(yaml.safe_dump(settings))
        main(["predict", "--config", str(root / "extract.yaml")])
        return Stopwatch.seconds

    runs: dict[str, Callable[[int], float]] = {
        "forward of ResNet50 alone, batches in memory": lambda _: timed(
            lambda: [networks.backbone(batch["images"]) for batch in batches]
        ),
        "forward of both networks, batches in memory": lambda _: timed(
            lambda: [networks.predict_step(batch, 0) for batch in batches]
        ),
        "extraction from JPEGs to shards": extract,
    }
    torch.set_num_threads(1)
    next(iter(runs.values()))(0)  # warms up
    seconds = [[run(repeat) for run in runs.values()] for repeat in range(REPEATS)]
    alone, both, extraction = (images / statistics.median(one) for one in zip(*seconds, strict=True))
    return [
        *(f"{name:51} {rate:9.1f} samples/s" for name, rate in zip(runs, (alone, both, extraction), strict=True)),
        f"extraction / forward of ResNet50                    {extraction / alone:9.2f}",
        f"extraction / forward of both networks               {extraction / both:9.2f}",
        *storage_cost(torch.cat([networks.backbone(batch["images"])[0] for batch in batches[:STORED]])),
    ]


def storage_cost(maps: Tensor) -> list[str]:
    """What storing maps (B, C, h, w) changes: 1 - cosine, averaged over locations."""
    quantised, steps = quantise(maps)
    stored = {"float16": maps.half().double(), "int8": quantised.double() * steps.double()[..., None, None]}
    lines = []
    for name, ours in stored.items():
        loss = (1 - cosine_similarity(ours, maps.double(), dim=1)).mean(dim=(1, 2))
        lines.append(f"1 - cosine of maps in {name:8} (mean; worst map)       {loss.mean():9.1e} {loss.max():9.1e}")
    return lines


def exhaust(loader: Iterable[Any]) -> None:
    """Take all batches."""
    for _ in loader:
        pass


def timed(work: Callable[[], Any]) -> float:
    """Seconds that something takes."""
    begun = time.perf_counter()
    with torch.inference_mode():
        work()
    return time.perf_counter() - begun


def write_set(folder: Path, samples: int, storage: Storage, image_format: ImageFormat) -> float:
    """Write samples of ResNet50's shapes, and return the bytes per sample of the same tensors, not packed."""
    rng = torch.Generator().manual_seed(0)
    photograph = Image.effect_noise((64, 64), 60).convert("RGB").resize((256, 256), Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(photograph.tobytes()), dtype=torch.uint8).view(256, 256, 3).permute(2, 0, 1)
    batch: Batch = {
        "images": (pixels / 127.5 - 1).expand(SHARD_SIZE, -1, -1, -1),
        "features": torch.randn(SHARD_SIZE, 2048, 7, 7, generator=rng).relu(),
        "logits": torch.randn(SHARD_SIZE, 1000, generator=rng),
        "moments": torch.randn(SHARD_SIZE, 8, 32, 32, generator=rng),
        "labels": torch.zeros(SHARD_SIZE, dtype=torch.int64),
        "source": ["bench"] * SHARD_SIZE,
        "key": [str(index) for index in range(SHARD_SIZE)],
    }
    settings = {**settings_of(batch, SHARD_SIZE, image_format, storage), "images": samples, "samples": samples}
    writer = ShardSetWriter(folder, "bench", cast(Settings, settings), provenance_of(batch))
    writer.begin()
    for _ in range(samples // SHARD_SIZE):
        writer.add(batch)
    writer.flush()
    writer.finish()
    writer.close()
    return 2 * (2048 * 7 * 7 + 1000 + 8 * 32 * 32) + 3 * 256 * 256


def bench_reading(root: Path, samples: int) -> list[str]:
    """The training loader, against reading the same tars from end to end."""
    raw = write_set(root / "set", samples, "float16", "png")
    tars = sorted((root / "set").glob("*.tar"))

    def forget() -> None:
        for path in (root / "set").iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def plain() -> None:
        for path in tars:
            with path.open("rb", buffering=0) as file:
                while file.read(1 << 20):
                    pass

    lines = []
    for state in ("in memory", "on disk"):
        seconds: dict[str, list[float]] = {"plain": [], "loader": []}
        data = FeatureShards(train=root / "set", batch_size=READ_BATCH, num_workers=2)
        loader = data.train_dataloader()
        plain()
        exhaust(loader)  # starts the workers
        for _ in range(REPEATS):
            for name, work in (("plain", plain), ("loader", partial(exhaust, loader))):
                if state == "on disk":
                    forget()
                seconds[name].append(timed(work))
        rates = {
            "plain": samples / statistics.median(seconds["plain"]),
            "loader": len(loader) * READ_BATCH / statistics.median(seconds["loader"]),
        }
        lines += [
            f"plain read of the tars, files {state:9}             {rates['plain']:9.0f} samples/s",
            f"training loader, 2 workers, files {state:9}         {rates['loader']:9.0f} samples/s",
            f"loader / plain read, files {state:9}                {rates['loader'] / rates['plain']:9.2f}",
        ]
    write_set(root / "small", SHARD_SIZE, "int8", "jpg")
    for name, folder, number in (("float16, png", "set", samples), ("int8, jpg", "small", SHARD_SIZE)):
        size = sum(path.stat().st_size for path in (root / folder).iterdir()) / number
        lines += [
            f"bytes per sample, {name:12}                      {size:9.0f}",
            f"bytes per sample / raw tensors, {name:12}        {size / raw:9.2f}",
        ]
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=192, help="to extract features of")
    parser.add_argument("--samples", type=int, default=2000, help="to read")
    parser.add_argument("--short", action="store_true", help="of few images and samples")
    options = parser.parse_args()
    if options.short:
        options.images, options.samples, REPEATS = BATCH_SIZE, SHARD_SIZE, 1
    os.environ["FEATINV_IMPORTS"] = __name__  # the stopwatch is named in a configuration
    with tempfile.TemporaryDirectory() as folder:
        found = [*bench_reading(Path(folder), options.samples), *bench_extraction(Path(folder), options.images)]
    print("\n".join(found))
