"""The weights of a regression are kept under all that decides them."""

from pathlib import Path

import torch
from safetensors.torch import save

from featinv_pl.evaluation.regression import IDENTITY, _read


def test_weights_are_found_under_their_own_identity_alone() -> None:
    path, weights = Path("regression.safetensors"), {"weight": torch.randn(3)}
    assert _read(path, "one") is None
    path.write_bytes(save(weights, {IDENTITY: "one"}))
    found = _read(path, "one")
    assert found is not None
    assert torch.equal(found["weight"], weights["weight"])
    assert _read(path, "other") is None
    path.write_bytes(path.read_bytes()[:-1])
    assert _read(path, "one") is None
