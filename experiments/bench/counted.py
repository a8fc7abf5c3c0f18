"""What a GPU would do in a training step and in a denoising step of the full-size model, counted without one.

Everything above the kernels is the real code: the Trainer, its callbacks, and the sampler.
"""

from contextlib import redirect_stderr
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers.logger import DummyLogger

from bench.counts import Counted, Counts
from bench.data import RandomData
from bench.pretended import GPU, Autocast, Gpu, Ranks, autocast, pretended_gpu, to_gpu
from featinv_pl.inverter.inverter import Execution
from featinv_pl.nets.control import Encoder, FeatureControl
from featinv_pl.nets.frozen import keep_products_in
from featinv_pl.nets.spared import spare_kernels
from featinv_pl.runtime.finite import FiniteGuard
from featinv_pl.runtime.progress import Progress, Speed
from featinv_pl.runtime.stopping import Stop
from featinv_pl.sampling.sampler import Sampler
from featinv_pl.sampling.solvers import sample
from featinv_pl.tasks.inversion import FeatureInversion
from tiny import make_classifier, make_prior

FEATURES = (2048, 7, 7)  # of ResNet50
SIDE, TOKENS, WIDTH = 256, 77, 768  # pixels; of a prompt of Stable Diffusion 1
UNET = {"sample_size": SIDE // 8, "cross_attention_dim": WIDTH}  # the rest is diffusers' default


class Steps(Callback):
    """Takes the counts of each step, from the start of one to the start of the next."""

    def __init__(self, counted: Counted) -> None:
        self.counted, self.base = counted, 0
        self.steps: list[Any] = []
        counted.counts = Counts()

    def on_train_batch_start(self, *args: Any) -> None:
        self.steps.append(self.counted.counts)
        self.counted.counts, self.base = Counts(), self.counted.live

    def on_before_backward(self, *args: Any) -> None:
        self.counted.counts.saved = self.counted.live - self.base


def full_size(folder: Path) -> FeatureInversion:
    """A FeatureInversion of Stable Diffusion 1 at 256 pixels whose networks have no values."""
    model = FeatureInversion(
        str(make_classifier(folder)), str(make_prior(folder)), optimizer=partial(torch.optim.AdamW, lr=1e-4, fused=True)
    )
    inverter, prior = model.inverter, model.inverter.prior
    inverter.__dict__["digests"] = {}  # which only values have
    with torch.device("meta"):
        prior.unet = UNet2DConditionModel(**UNET).requires_grad_(False).eval()
        inverter.control = FeatureControl(prior.unet, FEATURES[0], Encoder())
        prior.prompt, prior.empty = torch.empty(TOKENS, WIDTH), torch.empty(TOKENS, WIDTH)
        model.to("meta")
    spare_kernels(prior.unet)  # as one that is loaded
    inverter.execute(Execution(channels_last=True))
    return model


def training_steps(model: FeatureInversion, batch_size: int) -> list[Counts]:
    """The counts of a step that logs nothing."""
    data = RandomData(FEATURES, SIDE, batch_size)
    with pretended_gpu() as counted, redirect_stderr(StringIO()):
        to_gpu(model)
        steps = Steps(counted)
        trainer = Trainer(
            accelerator=Gpu(),
            devices=1,
            strategy=Ranks(),
            plugins=[Autocast()],
            max_steps=4,
            log_every_n_steps=3,
            logger=DummyLogger(),
            callbacks=[steps, Speed(), Progress(), FiniteGuard(), Stop()],
            gradient_clip_val=1.0,
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        trainer.fit(model, datamodule=data)
    return steps.steps


def sampling_loop(model: FeatureInversion, batch_size: int, sampler: Sampler) -> Counts:
    """The counts of one step within the loop: of two steps more, less what is done once, halved."""
    inverter, found = model.inverter, []
    with pretended_gpu() as counted:
        to_gpu(model)
        keep_products_in(inverter.prior, torch.bfloat16)
        maps = torch.empty(batch_size, *FEATURES, device=GPU)
        noise = torch.empty(batch_size, *inverter.prior.latent_grid(SIDE), device=GPU)
        for steps in (sampler.steps, 2 * sampler.steps):
            counted.counts = Counts()
            own = replace(sampler, steps=steps)
            with torch.no_grad(), autocast():
                sample(inverter.denoiser(maps, noise, own), noise, inverter.prior.schedule, own)
            found.append(counted.counts)
    return found[1].less(found[0], sampler.steps)


def measure(batch_size: int = 128) -> dict[str, dict[str, Any]]:
    """Both as rows of a table."""
    rows: dict[str, dict[str, Any]] = {}
    with TemporaryDirectory() as folder:
        step = training_steps(full_size(Path(folder)), batch_size)[2]
        rows[f"a training step of {batch_size}"] = step.row(batch_size)
        rows[f"a denoising step of {batch_size}"] = sampling_loop(full_size(Path(folder)), batch_size, Sampler()).row(
            batch_size
        )
    return rows
