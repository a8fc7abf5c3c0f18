"""Random numbers are a function of what they are for."""

import pytest
import torch
from torch import Tensor

from featinv_pl.sampling.noise import generator, keyed_noise

SHAPE = (4, 3, 2)


def draw(*identity: int | str) -> Tensor:
    return torch.randn(8, generator=generator(*identity))


def test_noise_of_a_key_is_the_same_in_every_batch() -> None:
    together = dict(zip("abc", keyed_noise(list("abc"), SHAPE, 1), strict=True))
    torch.manual_seed(99)
    shuffled = dict(zip("cda", keyed_noise(list("cda"), SHAPE, 1), strict=True))
    alone = keyed_noise(["a"], SHAPE, 1)
    assert torch.equal(together["a"], shuffled["a"])
    assert torch.equal(together["c"], shuffled["c"])
    assert torch.equal(together["a"], alone[0])
    assert alone.shape == (1, *SHAPE)


def test_noise_differs_between_keys_and_seeds() -> None:
    one, other = keyed_noise(["a", "b"], SHAPE, 1)
    assert not torch.equal(one, other)
    assert not torch.equal(one, keyed_noise(["a"], SHAPE, 2)[0])


def test_noise_is_standard_normal() -> None:
    noise = keyed_noise([str(number) for number in range(200)], (8, 8), 0)
    # Within four standard errors, for each place and over all.
    assert noise.mean().abs() < 4 / noise.numel() ** 0.5
    assert noise.mean(0).abs().max() < 4 / 200**0.5
    assert (noise.var() - 1).abs() < 4 * (2 / noise.numel()) ** 0.5


@pytest.mark.parametrize("other", [(0, 1, 3), (0, 2, 1), (1, 1, 2), (0, 12), (0, 1, 2, 0), ("0", "1", "2x")])
def test_generators_of_other_identities_differ(other: tuple[int | str, ...]) -> None:
    assert torch.equal(draw(0, 1, 2), draw(0, 1, 2))
    assert not torch.equal(draw(0, 1, 2), draw(*other))


def test_generator_leaves_the_global_state_alone() -> None:
    before = torch.get_rng_state()
    keyed_noise(["a"], SHAPE, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_seed_is_the_same_in_every_process_and_version() -> None:
    # Pinned: Python's own hash of a string would differ from process to process.
    assert generator(0, "clean/0001").initial_seed() == 8556001235840895831
