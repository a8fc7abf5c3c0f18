"""Parity with the authors' code: a small model of theirs, with their inputs and outputs.

`golden.json`, `golden_inputs` and `golden_compact` were recorded from the authors' code (CPU, fp32). Their
weights need not be stored, because they are a function of each tensor's name and shape.

`make parity` prints the table.
"""

import json
import math
import zlib
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
from featinv_pl.nets.autoencoder import LatentAutoencoder
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


def integers(name: str, count: int) -> np.ndarray:
    """Integers in [-7, 7], by splitmix64 from the name."""
    with np.errstate(over="ignore"):
        seed = np.uint64(zlib.crc32(name.encode())) << np.uint64(32)
        state = seed + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return ((state >> np.uint64(33)) % np.uint64(15)).astype(np.int64) - 7


def tensor(name: str, shape: list[int]) -> Tensor:
    """A weight of the recorded model."""
    values = integers(name, math.prod(shape)).reshape(shape)
    if len(shape) >= 2:
        exponent = round(math.log2(1 / (math.sqrt(math.prod(shape[1:])) * math.sqrt((15**2 - 1) / 12))))
        weight = values * 2.0**exponent
    else:
        weight = 1 + values / 32 if name.endswith(".weight") else values / 64
    return torch.from_numpy(weight.astype(np.float32))


def state_dict() -> dict[str, Tensor]:
    """The recorded model's weights, in LDM's layout, checked against their recorded checksums."""
    weights = {name: tensor(name, entry["shape"]) for name, entry in GOLDEN["keys"].items()}
    found = {name: zlib.crc32(value.numpy().tobytes()) for name, value in weights.items()}
    wrong = [name for name, entry in GOLDEN["keys"].items() if found[name] != entry["crc32_fp32"]]
    assert not wrong, wrong
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
    context, hint, noisy, timesteps = inputs["context"], inputs["hint"], inputs["x_t"], inputs["timesteps"]
    control, prior = inverter.control, inverter.prior
    differences: dict[str, float] = {}

    with torch.no_grad():
        encoded = control.encoder(hint, (32, 32))
        differences["hint block"] = difference(encoded[0, :, ::4, ::4], outputs["hint_out[0,:,::4,::4]"])
        wide = control.encoder(inputs["hint_9"], (32, 32)).mean(dim=(2, 3))
        differences["hint block, 9x9 map"] = difference(wide, outputs["hint_9_out_mean_hw"])
        down, middle = control(noisy, timesteps, context, encoded)
        for number, residual in enumerate([*down, middle]):
            name = f"control_{number:02d}[0,:,::4,::4]"
            differences[f"control tensor {number}"] = difference(residual[0, :, ::4, ::4], outputs[name])
        differences["predicted noise"] = difference(
            prior.predict(noisy, timesteps, context, (down, middle)), outputs["eps"]
        )
        differences["predicted noise without control"] = difference(
            prior.predict(noisy, timesteps, context), outputs["eps_no_control"]
        )
        null = control.encoder(torch.zeros_like(hint), (32, 32))
        uncontrolled = control(noisy, timesteps, inputs["uncond_context"], null)
        differences["predicted noise, features and prompt dropped"] = difference(
            prior.predict(noisy, timesteps, inputs["uncond_context"], uncontrolled), outputs["eps_zero_hint_uncond"]
        )
        differences |= _autoencoder(prior.autoencoder, inputs, outputs)

    differences |= _training(inverter, inputs, outputs)
    # Of one of the two samples, each of which has a prompt of its own.
    noise, prior.prompt, prior.empty = inputs["x_T"][:1], context[:1], inputs["uncond_context"][:1]
    sampler = Sampler("ddim", GOLDEN["ddim"]["steps"], GOLDEN["ddim"]["guidance"], "text")
    drawn = sample(inverter.denoiser(hint[:1], noise, sampler), noise, prior.schedule, sampler)
    differences["latents sampled in 10 steps"] = difference(drawn, outputs["ddim10/final"][:1])
    return differences


def _autoencoder(
    autoencoder: LatentAutoencoder, inputs: dict[str, Tensor], outputs: dict[str, Tensor]
) -> dict[str, float]:
    mean, log_variance = autoencoder.encode(inputs["image"]).chunk(2, dim=1)
    decoded = autoencoder.vae.decode(inputs["latent_8"]).sample
    return {
        "autoencoder, mean": difference(mean, outputs["vae_mean"]),
        "autoencoder, log-variance": difference(log_variance, outputs["vae_logvar"]),
        "autoencoder, decoded": difference(decoded[0, :, ::4, ::4], outputs["vae_decode[0,:,::4,::4]"]),
    }


def _training(inverter: Inverter, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> dict[str, float]:
    inverter.control.zero_grad()
    latents, noise, timesteps = inputs["x_start"], inputs["noise"], inputs["train_timesteps"]
    noisy_latents = inverter.prior.schedule.add_noise(latents, noise, timesteps)
    prediction = inverter.denoise(noisy_latents, timesteps, inputs["context"], inputs["hint"])
    loss = mse_loss(prediction, denoising_target(inverter.prior.schedule, latents, noise, timesteps))
    loss.backward()
    # What the gradients are called here, found by sending their names through the converter.
    gradients = {
        name: parameter.grad for name, parameter in inverter.control.named_parameters() if parameter.grad is not None
    }
    ours = {name: gradients[there] for name, there in control_names(inverter).items()}
    norms = GOLDEN["training"]["control_grad_norms"]
    found, expected = zip(*((float(ours[name].double().norm()), norm) for name, norm in norms.items()), strict=True)
    differences = {
        "training loss": abs(loss.item() / GOLDEN["training"]["loss"] - 1),
        "control gradients, all norms": difference(torch.tensor(found), torch.tensor(expected)),
    }
    for name in (name for name in outputs if name.startswith("grad/")):
        differences[f"gradient of {name.removeprefix('grad/')}"] = difference(
            ours[name.removeprefix("grad/")], outputs[name]
        )
    inverter.control.zero_grad()
    return differences


def control_names(inverter: Inverter) -> dict[str, str]:
    """Our name of each of the authors' control tensors: a number sent through the import comes out somewhere."""
    theirs = [name.removeprefix(ldm.CONTROL) for name in GOLDEN["keys"] if name.startswith(ldm.CONTROL)]
    state = {
        ldm.CONTROL + name: torch.full(GOLDEN["keys"][ldm.CONTROL + name]["shape"], float(number))
        for number, name in enumerate(theirs)
    }
    before = {name: value.clone() for name, value in inverter.control.state_dict().items()}
    ldm.load_control(inverter.control, state, "names")
    ours = {int(value.flatten()[0]): name for name, value in inverter.control.state_dict().items()}
    inverter.control.load_state_dict(before)
    return {name: ours[number] for number, name in enumerate(theirs)}


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Relative L2."""
    return float((ours.detach().double() - theirs.double()).norm() / theirs.double().norm())


def main() -> None:
    """Print the table."""
    with TemporaryDirectory() as folder:
        differences = figures(imported(write_parts(Path(folder), state_dict()), Path(folder, "model")))
    print("\nrelative L2 difference from the authors' code, fp32:")
    for name, value in differences.items():
        print(f"  {name:60} {value:.1e}")


if __name__ == "__main__":
    main()
