"""Guidance distilled into the control: its guided prediction is what is trained."""

from copy import deepcopy

import torch
from torch import Tensor

from featinv_pl.inverter.inverter import Inverter
from featinv_pl.nets.frozen import Frozen
from featinv_pl.nets.prior import Prior


class Teacher(Frozen):
    """A copy of a trained control, whose guided prediction is the target of that control (arXiv 2210.03142).

    Args:
        inverter: Whose control it is.
        scale: Guidance scale.
    """

    def __init__(self, inverter: Inverter, scale: float) -> None:
        super().__init__()
        self.control, self.scale = deepcopy(inverter.control), scale
        self.freeze()

    @torch.no_grad()
    def predict(self, prior: Prior, noisy_latents: Tensor, timesteps: Tensor, features: Tensor) -> Tensor:
        """The prediction for feature maps (B, C, h, w), guided away from that without map and prompt."""
        size = len(features)
        latents, times = noisy_latents.repeat(2, 1, 1, 1), timesteps.repeat(2)
        prompts = torch.stack([prior.empty, prior.prompt]).repeat_interleave(size, 0)
        encoded = self.control.encoder(torch.cat([torch.zeros_like(features), features]), latents.shape[-2:])
        residuals = self.control(latents, times, prompts, encoded)
        unconditional, conditional = prior.predict(latents, times, prompts, residuals).chunk(2)
        return (1 - self.scale) * unconditional + self.scale * conditional
