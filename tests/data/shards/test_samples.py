"""One entry there and back."""

import io
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn.functional import cosine_similarity

from conftest import MakeBatch
from featinv_pl.data.shards import samples as entries
from featinv_pl.data.shards.samples import ImageFormat, Sample, Storage, collate_samples, decode, prepare
from featinv_pl.errors import UserError
from featinv_pl.types import Batch, from_uint8, to_uint8


def encode(batch: Batch, index: int, image_format: ImageFormat, storage: Storage = "float16") -> dict[str, bytes]:
    return entries.encode(prepare(batch, storage, image_format)[index])


def back(members: dict[str, bytes], storage: Storage = "float16", with_images: bool = True) -> Sample:
    return decode(
        {name: memoryview(bytearray(data)) for name, data in members.items()}, storage, 32 if with_images else None
    )


def test_png_entry_comes_back_complete(make_batch: MakeBatch) -> None:
    batch = make_batch(3, source="corrupted/fog/3")
    batch["view"] = [{"number": 2, "crop": (1, 2, 3, 4), "flips": "h"}] * 3
    members = encode(batch, 1, "png")
    assert b'"view": {"number": 2, "crop": [1, 2, 3, 4], "flips": "h"}' in members["json"]
    sample = back(members)
    assert torch.equal(sample["images"], to_uint8(batch["images"][1]))
    for name in ("features", "logits", "moments"):
        assert torch.equal(sample[name], batch[name][1].half())
    assert (sample["labels"], sample["source"], sample["key"]) == (int(batch["labels"][1]), "corrupted/fog/3", "0-1")


def test_jpg_entry_looks_the_same(make_batch: MakeBatch) -> None:
    batch = make_batch(1)
    batch["images"] = torch.linspace(-1, 1, 32).expand(1, 3, 32, 32)
    members = encode(batch, 0, "jpg")
    assert Image.open(io.BytesIO(members["jpg"])).format == "JPEG"
    torch.testing.assert_close(from_uint8(back(members)["images"]), batch["images"][0], rtol=0, atol=0.05)


def test_the_image_comes_last_and_is_optional(make_batch: MakeBatch) -> None:
    batch = make_batch(2)
    assert list(encode(batch, 0, "png")) == ["json", "features.npy", "logits.npy", "latent.npy", "png"]
    assert "images" not in back(encode(batch, 0, "png"), with_images=False)
    samples = [back(encode(batch, index, "png"), with_images=False) for index in range(2)]
    assert collate_samples(samples).keys() == {"features", "logits", "moments", "labels", "source", "key"}


@pytest.mark.parametrize("storage", ["float16", "int8"])
@pytest.mark.parametrize("name", ["features", "logits", "moments"])
@pytest.mark.parametrize("value", [70000.0, float("nan")])
def test_refuses_what_half_cannot_hold(name: str, value: float, storage: Storage, make_batch: MakeBatch) -> None:
    batch: Any = make_batch(2)
    prepare(batch, storage)
    batch[name][1].flatten()[3] = value
    with pytest.raises(UserError, match=rf"The {name} do not fit .* is {value:g}, in 1 of 2 samples, such as '0-1'"):
        prepare(batch, storage)


def test_int8_costs_at_most_a_thousandth_of_cosine(make_batch: MakeBatch) -> None:
    batch = make_batch(8, shape=(64, 7, 7))
    # As networks make them: channels of very different size, mostly near zero, some all zero.
    maps = batch["features"] = batch["features"].relu() * torch.logspace(-2, 2, 64)[:, None, None]
    maps[:, 2] = maps[:, :, 0, 0] = 0
    restored = torch.stack([back(encode(batch, n, "png", "int8"), "int8")["features"] for n in range(8)]).float()
    assert (1 - cosine_similarity(restored.flatten(1), maps.flatten(1), dim=1)).max() < 1e-3
    somewhere = maps.abs().amax(dim=1) > 0
    assert (1 - cosine_similarity(restored, maps, dim=1))[somewhere].mean() < 1e-3
    assert torch.equal(restored[:, 2], maps[:, 2])
    step = maps.abs().amax(dim=(2, 3), keepdim=True) / 127
    assert ((restored - maps).abs() <= step / 2 + maps.abs() * 2**-10).all()
    assert len(encode(batch, 0, "png", "int8")["features.npy"]) < 0.6 * len(encode(batch, 0, "png")["features.npy"])
    maps[:, :, 0, 0] = 6e4  # beside which nothing else is more than a step
    with pytest.raises(UserError, match=r"`storage`: int8 would change a feature map by .* Store float16"):
        prepare(batch, "int8")
