"""Random numbers that depend on their purpose, not on the order of calls."""

import hashlib

import torch
from torch import Generator, Tensor


def generator(*identity: int | str) -> Generator:
    """A CPU generator seeded by its arguments, such as (seed, epoch, key of a sample).

    `seed_everything` gives every rank the same random state, and how samples are shared out among ranks must not
    change a sample's random numbers, which come from one of these.
    """
    digest = hashlib.blake2b("/".join(map(str, identity)).encode(), digest_size=8).digest()
    return Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def keyed_noise(keys: list[str], shape: tuple[int, ...], *identity: int | str) -> Tensor:
    """Standard normal noise (len(keys), *shape) in which each sample's part depends on its key and `identity` alone.

    A sample gets the same noise in every batch, on every rank and device, with every batch size.
    """
    return torch.stack([torch.randn(shape, generator=generator(*identity, key)) for key in keys])
