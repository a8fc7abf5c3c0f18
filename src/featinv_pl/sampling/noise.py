"""Random numbers that depend on their purpose, not on the order of calls."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Generator, Tensor


def generator(*identity: int | str) -> Generator:
    """A CPU generator seeded by its arguments, such as (seed, epoch, key of a sample).

    `seed_everything` gives every rank the same random state, and how samples are shared out among ranks must not
    change a sample's random numbers, which come from one of these.
    """
    digest = hashlib.blake2b("/".join(map(str, identity)).encode(), digest_size=8).digest()
    return Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


@dataclass(frozen=True)
class Draws:
    """What a training step draws, as a function of what it depends on besides a sample's key.

    Args:
        seed: Of the training.
        epoch: Of the training.
        num_timesteps: Length T of the noise schedule.
    """

    seed: int
    epoch: int
    num_timesteps: int

    def __call__(self, keys: list[str], shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Standard normal noise (2, B, *shape), timesteps (B,) below T, and chances (B,), uniform in [0, 1)."""
        rngs = [generator(self.seed, self.epoch, key) for key in keys]
        noise = torch.stack([torch.randn((2, *shape), generator=rng) for rng in rngs], dim=1)
        timesteps = torch.cat([torch.randint(self.num_timesteps, (1,), generator=rng) for rng in rngs])
        return noise, timesteps, torch.cat([torch.rand(1, generator=rng) for rng in rngs])


def keyed_noise(keys: list[str], shape: tuple[int, ...], *identity: int | str) -> Tensor:
    """Standard normal noise (len(keys), *shape) in which each sample's part depends on its key and `identity` alone.

    A sample gets the same noise in every batch, on every rank and device, with every batch size.
    """
    return torch.stack([torch.randn(shape, generator=generator(*identity, key)) for key in keys])
