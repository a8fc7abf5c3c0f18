"""Adversarial images: changed by a few grey levels, so that a classifier errs on many of them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from featinv_pl.errors import UserError
from featinv_pl.types import from_uint8, to_uint8


@dataclass(frozen=True)
class Attack:
    """Projected gradient descent in the maximum norm (Madry et al., arXiv 1706.06083).

    Args:
        epsilon: Largest change of any value, in grey levels of 255.
        step: Change in each step, in grey levels.
        steps: Number of steps.
    """

    epsilon: int = 4
    step: float = 1.0
    steps: int = 20

    def __post_init__(self) -> None:
        if self.epsilon < 1 or self.step <= 0 or self.steps < 1:
            raise UserError(
                f"`attack`: epsilon and steps must be at least 1, step above 0, and are {self.epsilon}, {self.steps} "
                f"and {self.step}."
            )


def attack(
    classify: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, start: Tensor, settings: Attack
) -> Tensor:
    """Change images so that they are not classified as their labels say, which need not succeed.

    Args:
        classify: From images (B, 3, H, W) in [-1, 1] to logits (B, K), differentiable also at black and white.
        images: (B, 3, H, W) in [-1, 1].
        labels: (B,) classes to get away from.
        start: Of the shape of `images`, uniform in [-1, 1]: the random start, as a share of epsilon.
        settings: How far, and in how many steps.

    Returns:
        (B, 3, H, W) in [-1, 1], as bytes would have it, within epsilon of `images` as bytes have them.
    """
    grey_level = 2 / 255
    epsilon, step = settings.epsilon * grey_level, settings.step * grey_level
    # Gradients need tensors that were not made in inference mode, in which Lightning predicts.
    with torch.inference_mode(False), torch.enable_grad():
        originals, labels = from_uint8(to_uint8(images)).clone(), labels.clone()
        attacked = (originals + epsilon * start.clone()).clamp(-1, 1)
        for _ in range(settings.steps):
            attacked = attacked.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(cross_entropy(classify(attacked), labels, reduction="sum"), attacked)
            change = (attacked.detach() + step * gradient.sign() - originals).clamp(-epsilon, epsilon)
            attacked = (originals + change).clamp(-1, 1)
        return from_uint8(to_uint8(attacked.detach()))
