"""Parity with the authors' code: a small model of theirs, with their inputs and outputs.

`golden.json`, `golden_inputs` and `golden_compact` were recorded from the authors' code (CPU, fp32). Their
weights need not be stored, because they are a function of each tensor's name and shape.

`make parity` prints the table.
"""

import json
import math
import zlib
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import timm
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import Tensor
from torch.nn.functional import mse_loss

from featinv_pl.inverter.inverter import Inverter
from featinv_pl.inverter.pipeline import FeatInvPipeline
from featinv_pl.nets import ldm
from featinv_pl.nets.prior import PROMPTS, write_prompts
from featinv_pl.nets.supported import SCHEDULE
from featinv_pl.publishing import import_official
from featinv_pl.sampling.diffusion import denoising_target
from featinv_pl.sampling.sampler import Sampler
from featinv_pl.sampling.solvers import sample

HERE = Path(__file__).parent / "golden"
GOLDEN = json.loads((HERE / "golden.json").read_text())
CHANNELS = GOLDEN["config"]["hint_channels"]
BOUND, SAMPLED_BOUND = 1e-5, 1e-4
State = dict[str, Tensor]
Pairs = dict[str, tuple[Tensor, Tensor]]


def tensor(name: str, shape: list[int]) -> Tensor:
    """A weight of the recorded model: integers in [-7, 7], by splitmix64 from its name, and scaled by its shape."""
    with np.errstate(over="ignore"):
        seed = np.uint64(zlib.crc32(name.encode())) << np.uint64(32)
        state = seed + np.arange(1, math.prod(shape) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    values = (((state >> np.uint64(33)) % np.uint64(15)).astype(np.int64) - 7).reshape(shape)
    if len(shape) >= 2:
        weight = values * 2.0 ** round(-math.log2(math.sqrt(math.prod(shape[1:]) * (15**2 - 1) / 12)))
    else:
        weight = 1 + values / 32 if name.endswith(".weight") else values / 64
    return torch.from_numpy(weight.astype(np.float32))


def state_dict() -> dict[str, Tensor]:
    """The recorded model's weights, in LDM's layout, checked against their recorded checksums."""
    weights = {name: tensor(name, entry["shape"]) for name, entry in GOLDEN["keys"].items()}
    for name, entry in GOLDEN["keys"].items():
        assert zlib.crc32(weights[name].numpy().tobytes()) == entry["crc32_fp32"], name
    return weights


def write_prior(folder: Path, state: dict[str, Tensor]) -> Path:
    """The recorded model's frozen part, in diffusers' layout."""
    inputs = load_file(HERE / "golden_inputs.safetensors")
    ldm.unet(state, "state", GOLDEN["config"]["num_heads"]).save_pretrained(folder / "unet")
    ldm.autoencoder(state, "state").save_pretrained(folder / "vae")
    DDIMScheduler(**SCHEDULE).save_pretrained(folder / "scheduler")
    write_prompts(folder / PROMPTS, inputs["context"][0], inputs["uncond_context"][0])
    return folder


def write_backbone(folder: Path) -> Path:
    """A classifier with as many channels as the recorded maps."""
    model = timm.create_model("test_resnet", num_classes=10, channels=[8, 8, 8, CHANNELS])
    save_for_hf(model, str(folder), safe_serialization=True)
    return folder


def write_parts(folder: Path, state: dict[str, Tensor]) -> Path:
    """The recorded checkpoint, and the parts that it belongs to."""
    save_file(state, folder / "authors.safetensors")
    write_backbone(folder / "backbone")
    write_prior(folder / "prior", state)
    return folder


def imported(parts: Path, model: Path) -> Inverter:
    """The recorded checkpoint, brought through `import` and loaded."""
    import_official(parts / "authors.safetensors", model, str(parts / "backbone"), str(parts / "prior"))
    return FeatInvPipeline.from_pretrained(model).inverter


def figures(inverter: Inverter) -> dict[str, float]:
    """Relative L2 differences between our outputs and the authors', by what is compared."""
    inputs, outputs = load_file(HERE / "golden_inputs.safetensors"), load_file(HERE / "golden_compact.safetensors")
    prior, context, empty = inverter.prior, inputs["context"], inputs["uncond_context"]
    with torch.no_grad():
        pairs = _untrained(inverter, inputs, outputs)
    pairs |= _training(inverter, inputs, outputs)
    # Of one of the two samples, each of which has a prompt of its own.
    noise, prior.prompt, prior.empty = inputs["x_T"][:1], context[:1], empty[:1]
    sampler = Sampler("ddim", GOLDEN["ddim"]["steps"], GOLDEN["ddim"]["guidance"], "text")
    sampled = sample(inverter.denoiser(inputs["hint"][:1], noise, sampler), noise, prior.schedule, sampler)
    pairs["latents sampled in 10 steps"] = (sampled, outputs["ddim10/final"][:1])
    return {name: difference(*pair) for name, pair in pairs.items()}


def _untrained(inverter: Inverter, inputs: State, outputs: State) -> Pairs:
    names = ("context", "uncond_context", "hint", "x_t", "timesteps")
    context, empty, hint, noisy, timesteps = (inputs[name] for name in names)
    control, prior, autoencoder = inverter.control, inverter.prior, inverter.prior.autoencoder
    encoded = control.encoder(hint, (32, 32))
    wide = control.encoder(inputs["hint_9"], (32, 32)).mean(dim=(2, 3))
    down, middle = control(noisy, timesteps, context, encoded)
    null = control(noisy, timesteps, empty, control.encoder(torch.zeros_like(hint), (32, 32)))
    mean, log_variance = autoencoder.encode(inputs["image"]).chunk(2, dim=1)
    decoded = autoencoder.vae.decode(inputs["latent_8"]).sample
    part = (0, slice(None), slice(None, None, 4), slice(None, None, 4))  # what was recorded of large tensors
    return {
        "hint block": (encoded[part], outputs["hint_out[0,:,::4,::4]"]),
        "hint block, 9x9 map": (wide, outputs["hint_9_out_mean_hw"]),
        **{
            f"control tensor {number}": (residual[part], outputs[f"control_{number:02d}[0,:,::4,::4]"])
            for number, residual in enumerate([*down, middle])
        },
        "predicted noise": (prior.predict(noisy, timesteps, context, (down, middle)), outputs["eps"]),
        "predicted noise without control": (prior.predict(noisy, timesteps, context), outputs["eps_no_control"]),
        "predicted noise, both dropped": (
            prior.predict(noisy, timesteps, empty, null),
            outputs["eps_zero_hint_uncond"],
        ),
        "autoencoder, mean": (mean, outputs["vae_mean"]),
        "autoencoder, log-variance": (log_variance, outputs["vae_logvar"]),
        "autoencoder, decoded": (decoded[part], outputs["vae_decode[0,:,::4,::4]"]),
    }


def _training(inverter: Inverter, inputs: State, outputs: State) -> Pairs:
    inverter.control.zero_grad()
    latents, noise, timesteps = inputs["x_start"], inputs["noise"], inputs["train_timesteps"]
    noisy_latents = inverter.prior.schedule.add_noise(latents, noise, timesteps)
    encoded = inverter.control.encoder(inputs["hint"], noisy_latents.shape[-2:])
    prediction = inverter.denoise(noisy_latents, timesteps, inputs["context"], encoded)
    loss = mse_loss(prediction, denoising_target(inverter.prior.schedule, latents, noise, timesteps))
    loss.backward()
    named = deepcopy(inverter.control)  # whose state dict gives gradients the names of weights
    for weight, trained in zip(named.parameters(), inverter.control.parameters(), strict=True):
        weight.data = torch.as_tensor(trained.grad)
    gradients_of = named.state_dict()
    ours = {name: gradients_of[there] for name, there in control_names(inverter).items()}
    inverter.control.zero_grad()
    norms, recorded = GOLDEN["training"]["control_grad_norms"], torch.tensor(GOLDEN["training"]["loss"])
    found, expected = zip(*((float(ours[name].double().norm()), norm) for name, norm in norms.items()), strict=True)
    gradients = {name.removeprefix("grad/"): value for name, value in outputs.items() if name.startswith("grad/")}
    return {
        "training loss": (loss, recorded),
        "control gradients, all norms": (torch.tensor(found), torch.tensor(expected)),
        **{f"gradient of {name}": (ours[name], value) for name, value in gradients.items()},
    }


def control_names(inverter: Inverter) -> dict[str, str]:
    """Our name of each of the authors' control tensors: a number sent through the import comes out somewhere."""
    theirs = [name for name in GOLDEN["keys"] if name.startswith(ldm.CONTROL)]
    state = {name: torch.full(GOLDEN["keys"][name]["shape"], float(place)) for place, name in enumerate(theirs)}
    before = {name: value.clone() for name, value in inverter.control.state_dict().items()}
    ldm.load_control(inverter.control, state, "names")
    ours = inverter.control.state_dict().items()
    names = {theirs[int(value.flatten()[0])].removeprefix(ldm.CONTROL): name for name, value in ours}
    inverter.control.load_state_dict(before)
    return names


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Relative L2."""
    return float((ours.detach().double() - theirs.double()).norm() / theirs.double().norm())


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        differences = figures(imported(write_parts(Path(folder), state_dict()), Path(folder, "model")))
    print("\nrelative L2 difference from the authors' code, fp32:")
    for name, value in differences.items():
        print(f"  {name:60} {value:.1e}")
