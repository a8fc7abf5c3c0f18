"""The training objective of a control."""

from dataclasses import dataclass

from featinv_pl.sampling.sampler import check_option


@dataclass(frozen=True)
class Objective:
    """The training objective of a control: the error of the predicted noise or velocity, and what changes it.

    Args:
        dropout: Probability of replacing feature map and prompt together, by zeros and the empty prompt, which
            trains the unconditional branch of guidance.
        min_snr_gamma: Weights timesteps by their signal-to-noise ratio, cut at this value (Min-SNR, arXiv
            2303.09556). With null all timesteps count alike, as in the authors' code.
        consistency: Weight of the feature-consistency loss: 1 - cosine between the given map and the
            classifier's map of the decoded estimate, at timesteps with little noise.
        consistency_below: The noisiest of these timesteps, as a fraction of the schedule.
    """

    dropout: float = 0.15
    min_snr_gamma: float | None = 5.0
    consistency: float = 0.0
    consistency_below: float = 0.3

    def __post_init__(self) -> None:
        gamma, weight, below = self.min_snr_gamma, self.consistency, self.consistency_below
        check_option("objective.dropout", self.dropout, 0 <= self.dropout < 1, "Give a probability below 1.")
        check_option("objective.min_snr_gamma", gamma, gamma is None or gamma > 0, "Give a number above 0, such as 5.")
        check_option("objective.consistency", weight, weight >= 0, "Give at least 0, which disables the loss.")
        check_option("objective.consistency_below", below, 0 < below <= 1, "Give a fraction of the noise schedule.")
