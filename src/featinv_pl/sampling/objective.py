"""The training objective of a control."""

from dataclasses import dataclass

from featinv_pl.sampling.diffusion import Weighting
from featinv_pl.sampling.sampler import check_option


@dataclass(frozen=True)
class Objective:
    """The training objective of a control: the error of the predicted noise or velocity, and what changes it.

    Args:
        dropout: Probability (0 to 1) of replacing feature map and prompt together, by zeros and the empty prompt, which
            trains the unconditional branch of guidance.
        weighting: How much the errors of timesteps count: `velocity` counts them as those of the velocity, most where
            there is most noise; `min-snr` cuts the weight of easy ones (arXiv 2303.09556); `none` leaves the errors of
            what the prior predicts as they are, as in the authors' code.
        regression: Weight of an auxiliary loss: the squared error of the clean latents that one convolution reads from
            the feature encoder's last hidden activations. It is thrown away after training.
        consistency: Weight of the feature-consistency loss: 1 - cosine between the given map and the
            classifier's map of the decoded estimate, at timesteps with little noise.
        consistency_below: The noisiest of these timesteps, as a fraction of the schedule, and of how much of a batch
            it is computed at most: of the samples with the least noise.
        distilled_guidance: Guidance scale at which the prediction of the control to `adapt` is what is trained,
            in place of noise or velocity: sampling without guidance then gives what guidance gave, at half the cost.
    """

    dropout: float = 0.15
    weighting: Weighting = "velocity"
    regression: float = 1.0
    consistency: float = 0.0
    consistency_below: float = 0.3
    distilled_guidance: float | None = None

    def __post_init__(self) -> None:
        weight, below, regression = self.consistency, self.consistency_below, self.regression
        scale = self.distilled_guidance
        check_option("objective.distilled_guidance", scale, scale is None or scale > 1, "Give a scale above 1.")
        check_option("objective.dropout", self.dropout, 0 <= self.dropout < 1, "Give a probability below 1.")
        check_option("objective.regression", regression, regression >= 0, "Give at least 0, which disables the loss.")
        check_option("objective.consistency", weight, weight >= 0, "Give at least 0, which disables the loss.")
        check_option("objective.consistency_below", below, 0 < below <= 1, "Give a fraction of the noise schedule.")
