"""What a preview decoder saves, and what it costs, on the demo's test digits: `python -m bench.preview`.

It takes the demo's inverter, which `featinv-pl export runs/demo/spatial runs/demo/model` writes, the small decoder of
experiments/digits/preview.yaml, and the held-out classifier of `make study`.
"""

from argparse import ArgumentParser
from time import process_time

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torch.utils.flop_counter import FlopCounterMode

from featinv_pl.data.images.digits import DigitImages
from featinv_pl.inverter.inverter import Inverter
from featinv_pl.inverter.pipeline import FeatInvPipeline
from featinv_pl.nets.autoencoder import LatentAutoencoder
from featinv_pl.nets.backbone import Backbone
from featinv_pl.sampling.sampler import Refinement, Sampler
from featinv_pl.types import from_uint8

BATCH = 50
REFINED = Sampler("dpm", steps=10, guidance_scale=1.0, refine=Refinement())
TRAINING_FREE = Sampler(
    *("ddim", 30), guidance_scale=1.0, control_scale=0.0, refine=Refinement(5, 0.1, interval=(0.0, 1.0))
)


def main() -> None:
    """Print one row for each sampler, without and with the preview decoder."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="runs/demo/model")
    parser.add_argument("--preview", default="runs/demo/preview/model")
    parser.add_argument("--judge", default="runs/study/digits/judge/model")
    parser.add_argument("--images", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    inverter = FeatInvPipeline.from_pretrained(options.model).inverter
    judge, preview = Backbone(options.judge), LatentAutoencoder.load(options.preview)
    digits = DigitImages("clean", options.images)
    originals = torch.stack([from_uint8(digits[index].images) for index in range(len(digits))])
    latents = torch.randn(1, *inverter.prior.latent_grid(inverter.image_size))
    for name, autoencoder in (("own", inverter.prior.autoencoder), ("preview", preview)):
        with FlopCounterMode(display=False) as counter:
            autoencoder.decode(latents)
        print(f"{name} decoder: {counter.get_total_flops() / 1e6:.0f} MFLOP an image")
    print("| sampler | preview decoder | CPU s | cosine | top-1 | held-out cosine | held-out top-1 |")
    print("|---|---|--:|--:|--:|--:|--:|")
    for name, sampler in (("refined", REFINED), ("training-free", TRAINING_FREE)):
        for inverter.preview in (None, preview):
            images, seconds = reconstructed(inverter, originals, sampler)
            own, held_out = (scores(classifier, images, originals) for classifier in (inverter.classifier, judge))
            figures = [f"{value:.3f}" for value in (*own, *held_out)]
            print("|", " | ".join([name, "with" if inverter.preview else "without", f"{seconds:.1f}", *figures]), "|")


@torch.no_grad()
def reconstructed(inverter: Inverter, originals: Tensor, sampler: Sampler) -> tuple[Tensor, float]:
    """The reconstructions of images by a sampler, and its CPU seconds."""
    features = inverter.classifier.classify(originals)["features"]
    keys = [str(index) for index in range(len(originals))]
    start = process_time()
    parts = [
        inverter.reconstruct(features[first : first + BATCH], keys[first : first + BATCH], 0, sampler)
        for first in range(0, len(keys), BATCH)
    ]
    return torch.cat(parts), process_time() - start


def scores(classifier: Backbone, images: Tensor, originals: Tensor) -> tuple[float, float]:
    """Mean cosine of the maps of a classifier, and how often its prediction stays."""
    made, given = classifier.classify(images), classifier.classify(originals)
    cosine = cosine_similarity(made["features"], given["features"]).mean()
    same = made["logits"].argmax(1) == given["logits"].argmax(1)
    return float(cosine), float(same.float().mean())


if __name__ == "__main__":
    main()
