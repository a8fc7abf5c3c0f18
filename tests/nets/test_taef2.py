"""The tiny autoencoder against recorded outputs of the original."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from featinv_pl.errors import UserError
from featinv_pl.nets.taef2 import TinyAutoencoder

SHARED = Path(__file__).parents[3] / "shared"
WEIGHTS, VECTORS = SHARED / "weights/taef2.safetensors", SHARED / "golden/taef2.safetensors"


@pytest.mark.skipif(not VECTORS.is_file(), reason="the published weights are not here")
def test_computes_what_the_original_computes() -> None:
    model, recorded = TinyAutoencoder.from_file(WEIGHTS, "prior"), load_file(VECTORS)
    images = recorded["images_uint8"].float() / 127.5 - 1
    with torch.no_grad():
        torch.testing.assert_close(model.encode(images), recorded["latents"], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model.decode(recorded["latents"]), recorded["decoded"], atol=1e-4, rtol=1e-4)


def test_is_saved_and_loaded(tmp_path: Path) -> None:
    model = TinyAutoencoder(shift=(0.5,) * 32)
    model.save_pretrained(tmp_path / "vae")
    again = TinyAutoencoder.from_pretrained(tmp_path / "vae")
    assert list(again.config.shift) == [0.5] * 32
    latents = torch.randn(1, 32, 2, 2)
    assert torch.equal(again.decode(latents), model.decode(latents))


def test_another_file_is_refused(tmp_path: Path) -> None:
    save_file({"encoder.0.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="tensors of the autoencoder in .* are missing"):
        TinyAutoencoder.from_file(tmp_path / "other.safetensors", "prior")
