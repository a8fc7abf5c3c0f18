"""Random numbers are a function of what they are for."""

import pytest
import torch

from featinv_pl.sampling.noise import generator, keyed_noise

SHAPE = (4, 3, 2)


def test_noise_of_a_key_is_the_same_in_every_batch() -> None:
    before = torch.get_rng_state()
    together = dict(zip("abc", keyed_noise(list("abc"), SHAPE, 1), strict=True))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    shuffled = dict(zip("cda", keyed_noise(list("cda"), SHAPE, 1), strict=True))
    assert torch.equal(together["a"], shuffled["a"])
    assert torch.equal(together["c"], shuffled["c"])
    assert torch.equal(together["a"][None], keyed_noise(["a"], SHAPE, 1))
    assert not torch.equal(together["a"], together["b"])
    assert not torch.equal(together["a"], keyed_noise(["a"], SHAPE, 2)[0])


def test_noise_is_standard_normal() -> None:
    noise = keyed_noise([str(number) for number in range(200)], (8, 8), 0)
    # Within four standard errors, for each place and over all.
    assert noise.mean().abs() < 4 / noise.numel() ** 0.5
    assert noise.mean(0).abs().max() < 4 / 200**0.5
    assert (noise.var() - 1).abs() < 4 * (2 / noise.numel()) ** 0.5


@pytest.mark.parametrize("other", [(0, 1, 3), (0, 2, 1), (1, 1, 2), (0, 12), (0, 1, 2, 0), ("0", "1", "2x")])
def test_generators_of_other_identities_differ(other: tuple[int | str, ...]) -> None:
    first, again, different = (torch.randn(8, generator=generator(*one)) for one in ((0, 1, 2), (0, 1, 2), other))
    assert torch.equal(first, again)
    assert not torch.equal(first, different)


def test_seed_is_the_same_in_every_process_and_version() -> None:
    # Pinned: Python's own hash of a string would differ from process to process.
    assert generator(0, "clean/0001").initial_seed() == 8556001235840895831
