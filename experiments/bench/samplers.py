"""What fewer computations cost, on the demo's test digits: `python -m bench.samplers`.

It takes the demo's inverters, which `featinv-pl export runs/demo/NAME runs/demo/model-NAME` writes for spatial and
pooled, and the held-out classifier of `make study`. Arithmetic is counted at full size, on tensors without values.
"""

from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from featinv_pl.data.images.digits import DigitImages
from featinv_pl.inverter.inverter import Inverter
from featinv_pl.inverter.pipeline import FeatInvPipeline
from featinv_pl.metrics.distances import FrechetDistance
from featinv_pl.metrics.similarity import Diversity
from featinv_pl.nets.backbone import Backbone
from featinv_pl.nets.control import Encoder, FeatureControl
from featinv_pl.sampling.sampler import AUTHORS, Sampler

BATCH, SAMPLES = 120, 2
FIFTEEN = Sampler("dpm", steps=15, guidance_scale=1.5)
EIGHT = replace(FIFTEEN, steps=8)
SAMPLERS = {
    "dpm 15": FIFTEEN,
    "dpm 8": EIGHT,
    "dpm 8, guidance_every 2": replace(EIGHT, guidance_every=2),
    "dpm 8, guidance_every 2, control_every 2": replace(EIGHT, guidance_every=2, control_every=2),
    "dpm 8, guidance_every 4": replace(EIGHT, guidance_every=4),
    "dpm 8, unguided": replace(EIGHT, guidance_scale=1.0),
    "dpm 3": replace(FIFTEEN, steps=3),
}


def main(args: list[str] | None = None) -> None:
    """Print one row for each inverter and sampler."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["runs/demo/model-spatial", "runs/demo/model-pooled"])
    parser.add_argument("--judge", default="runs/study/digits/judge/model")
    parser.add_argument("--images", type=int, default=240)
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    judge, digits = Backbone(options.judge), DigitImages("clean", options.images)
    originals, costs = torch.stack([digits[index].images for index in range(len(digits))]), full_size()
    print("| inverter | sampler | TFLOP | cosine | held-out cosine | held-out top-1 | held-out FD | diversity |")
    print("|---|---|--:|--:|--:|--:|--:|--:|")
    for model in options.models:
        inverter = FeatInvPipeline.from_pretrained(model).inverter
        for name, sampler in SAMPLERS.items():
            figures = [f"{value:.4f}" for value in measured(inverter, judge, originals, sampler)]
            print("|", " | ".join([Path(model).name, name, f"{cost(sampler, *costs):.2f}", *figures]), "|", flush=True)
    print(f"authors: {cost(AUTHORS, *costs):.2f} TFLOP")


@torch.no_grad()
def measured(inverter: Inverter, judge: Backbone, originals: Tensor, sampler: Sampler) -> tuple[float, ...]:
    """Cosine, the held-out classifier's cosine and agreement, its Fréchet distance, and diversity of pixels."""
    target, expected = inverter.classifier.classify(originals)["features"], judge.classify(originals)
    keys = [str(number) for number in range(len(originals))]
    distance, scores, images, maps = FrechetDistance(judge.feature_shape[0], "fd"), [], [], []
    for seed in range(SAMPLES):
        starts = range(0, len(keys), BATCH)
        parts = [slice(start, start + BATCH) for start in starts]
        drawn = torch.cat([inverter.reconstruct(target[part], keys[part], seed, sampler) for part in parts])
        own, held_out = inverter.classifier.classify(drawn), judge.classify(drawn)
        images.append(own["images"])
        maps.append(own["features"])
        cosines = [
            torch.cosine_similarity(found, given).mean()
            for found, given in ((own["features"], target), (held_out["features"], expected["features"]))
        ]
        same = (held_out["logits"].argmax(1) == expected["logits"].argmax(1)).float().mean()
        scores.append(torch.stack([*cosines, same]))
        distance.update(held_out["features"], expected["features"])
    spread = Diversity().score((torch.stack(images, 1), torch.stack(maps, 1)), originals)[:, 0].mean()
    return *torch.stack(scores).mean(0).tolist(), float(distance.compute()["fd"]), float(spread)


def full_size() -> tuple[float, float, float]:
    """TFLOP of the feature encoder, the control and the prior's UNet, once for one image of 256 pixels."""
    with FakeTensorMode():
        unet = UNet2DConditionModel(sample_size=32, cross_attention_dim=768)
        control = FeatureControl(unet, 1024, Encoder())
        latents, prompts, maps = torch.zeros(1, 4, 32, 32), torch.zeros(1, 77, 768), torch.zeros(1, 1024, 9, 9)
        given, counts = (latents, torch.zeros((), dtype=torch.long), prompts), []
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            encoded = control.encoder(maps, latents.shape[-2:])
            counts.append(counter.get_total_flops())
            down, middle = control(*given, encoded)
            counts.append(counter.get_total_flops())
            unet(*given, down_block_additional_residuals=down, mid_block_additional_residual=middle)
            counts.append(counter.get_total_flops())
    encoder, with_control, everything = (count / 1e12 for count in counts)
    return encoder, with_control - encoder, everything - with_control


def cost(sampler: Sampler, encoder: float, control: float, unet: float) -> float:
    """TFLOP of an image, without decoding; guidance acts over the whole schedule."""
    branches = [
        2 if sampler.guidance_scale != 1 and number % sampler.guidance_every == 0 else 1
        for number in range(sampler.steps)
    ]
    controlled = sum(count for number, count in enumerate(branches) if number % sampler.control_every == 0)
    encodings = 2 if sampler.guidance_scale != 1 and sampler.guidance == "features" else 1
    return encodings * encoder + controlled * control + sum(branches) * unet


if __name__ == "__main__":
    main()
