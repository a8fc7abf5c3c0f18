"""A training step of ours against that of diffusers' own script for ControlNets, both from stored latents.

The script is examples/controlnet/train_controlnet.py: its ControlNet runs under autocast, its UNet in the dtype of
that, its AdamW is torch's default, and gradients are clipped. Both loops take the same batches through the same
networks in turn.

make bench FLAGS="--parts loops"
"""

from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW

from bench import machine
from bench.counted import FEATURES, SIDE, TOKENS, WIDTH
from featinv_pl.nets.control import Encoder, FeatureControl
from featinv_pl.nets.frozen import keep_products_in
from featinv_pl.nets.spared import spare_kernels
from featinv_pl.runtime.finite import total_norm
from featinv_pl.tasks.inversion import FeatureInversion
from featinv_pl.types import Batch
from tiny import make_classifier, make_prior

SIZES: dict[str, dict[str, Any]] = {
    "64 channels": {"block_out_channels": [64, 128, 256, 256], "attention_head_dim": 8},
    "full size": {},  # diffusers' default, 320 channels
}
TINY = {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1}


def measure(rounds: int, sizes: dict[str, dict[str, Any]], batch_size: int = 1) -> dict[str, dict[str, float]]:
    """Seconds a step of both, medians of so many rounds, by size and precision; of a CPU, those that it was used."""
    found = {}
    for size, unet in sizes.items():
        for precision in ("fp32", "bf16"):
            ways = _ways(unet, batch_size, precision == "bf16", shared=size == "full size")
            seconds: dict[str, list[float]] = {name: [] for name in ways}
            for turn in range(rounds + 1):
                for name, step in ways.items():
                    taken = machine.timed(step, machine.used)
                    if turn:  # the first allocates the optimizer's moments
                        seconds[name].append(taken)
            found[f"{size}, {precision}"] = {name: median(taken) for name, taken in seconds.items()}
            found[f"{size}, {precision}"]["ratio"] = median(
                theirs / ours for theirs, ours in zip(seconds["diffusers"], seconds["ours"], strict=True)
            )
    return found


def _ways(unet: dict[str, Any], batch_size: int, mixed: bool, shared: bool) -> dict[str, Callable[[], None]]:
    """A step of each loop."""
    torch.manual_seed(0)
    with TemporaryDirectory() as folder:
        model = FeatureInversion(str(make_classifier(Path(folder))), str(make_prior(Path(folder))))
    inverter, prior = model.inverter, model.inverter.prior
    prior.unet = UNet2DConditionModel(sample_size=SIDE // 8, cross_attention_dim=WIDTH, **unet)
    prior.unet.requires_grad_(False).eval()
    prior.prompt, prior.empty = torch.randn(2, TOKENS, WIDTH)
    inverter.control = FeatureControl(prior.unet, FEATURES[0], Encoder())
    # At full size there is memory for one set of networks; as ours, theirs is a little faster, too.
    theirs: Any = [prior.unet, inverter.control] if shared else [deepcopy(prior.unet), deepcopy(inverter.control)]
    if not shared:
        theirs[1].controlnet = ControlNetModel.from_unet(theirs[0])
        theirs[1].controlnet.controlnet_cond_embedding = nn.Identity()
    if mixed:
        keep_products_in(prior.unet, torch.bfloat16)
        theirs[0].to(torch.bfloat16)
    spare_kernels(prior.unet)
    batch = Batch(
        features=torch.randn(batch_size, *FEATURES),
        moments=torch.randn(batch_size, 8, SIDE // 8, SIDE // 8),
        key=[str(number) for number in range(batch_size)],
    )  # type: ignore[typeddict-item]
    return {
        "diffusers": partial(
            _theirs, theirs[0], theirs[1], AdamW(theirs[1].parameters(), lr=1e-4), model, batch, mixed
        ),
        "ours": partial(_ours, model, AdamW(inverter.control.parameters(), lr=1e-4, fused=True), batch, mixed),
    }


def _autocast(mixed: bool) -> Any:
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if mixed else nullcontext()


def _ours(model: FeatureInversion, optimizer: AdamW, batch: Batch, mixed: bool) -> None:
    with _autocast(mixed):
        loss = model.training_step(batch, 0)
    loss.backward()
    model.gradient_norm = total_norm(optimizer)
    nn.utils.clip_grads_with_norm_(model.inverter.control.parameters(), 1.0, model.gradient_norm)
    optimizer.step()
    optimizer.zero_grad()


def _theirs(
    unet: nn.Module, control: Any, optimizer: AdamW, model: FeatureInversion, batch: Batch, mixed: bool
) -> None:
    prior, dtype = model.inverter.prior, torch.bfloat16 if mixed else torch.float32
    latents = prior.autoencoder.sample(batch["moments"], torch.randn(len(batch["moments"]), 4, SIDE // 8, SIDE // 8))
    noise = torch.randn_like(latents)
    timesteps = torch.randint(0, prior.num_timesteps, (len(latents),))
    noisy: Tensor = prior.schedule.add_noise(latents, noise, timesteps)
    prompts = prior.prompt.expand(len(latents), -1, -1)
    with _autocast(mixed):
        maps = functional.interpolate(batch["features"], noisy.shape[-2:], mode="bilinear", align_corners=False)
        encoded = control.encoder.layers(maps)
        down, middle = control.controlnet(noisy, timesteps, prompts, encoded, return_dict=False)
    prediction = unet(
        noisy.to(dtype),
        timesteps,
        encoder_hidden_states=prompts.to(dtype),
        down_block_additional_residuals=[one.to(dtype) for one in down],
        mid_block_additional_residual=middle.to(dtype),
        return_dict=False,
    )[0]
    functional.mse_loss(prediction.float(), noise).backward()
    nn.utils.clip_grad_norm_(control.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
