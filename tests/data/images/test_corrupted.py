"""Corrupting any images on the fly: names, seeds, and options that make no sense."""

from typing import Any, cast

import numpy as np
import pytest
import torch

from featinv_pl.data.images.corrupted import CorruptedImages
from featinv_pl.data.images.corruptions import CORRUPTIONS, corrupt
from featinv_pl.data.images.datamodule import CorruptedData
from featinv_pl.data.images.digits import DigitImages, DigitsData
from featinv_pl.errors import UserError
from featinv_pl.types import key_hash, to_uint8


def test_an_image_is_corrupted_by_its_key() -> None:
    images = DigitImages("clean")
    corrupted = CorruptedImages(images, "shot_noise", 4)
    assert (corrupted.source, len(corrupted)) == ("clean-corrupted/shot_noise/4", len(images))
    sample, original = corrupted[3], images[3]
    assert sample["source"] == corrupted.source
    assert (sample["key"], sample["labels"]) == (original["key"], original["labels"])
    pixels = to_uint8(original["images"]).permute(1, 2, 0).numpy()
    expected = corrupt(pixels, "shot_noise", 4, seed=key_hash(original["key"]))
    np.testing.assert_array_equal(to_uint8(sample["images"]).permute(1, 2, 0).numpy(), expected)
    assert not torch.equal(sample["images"], original["images"])


def test_gives_every_corruption_of_every_source() -> None:
    data = CorruptedData(DigitsData(["clean", "hard"], batch_size=7), ["fog", "contrast"], [1, 5])
    loaders = data.predict_dataloader()
    assert [cast(Any, loader.dataset).images.source for loader in loaders] == [
        f"{source}-corrupted/{name}/{severity}"
        for source in ("clean", "hard")
        for name in ("fog", "contrast")
        for severity in (1, 5)
    ]
    batch: Any = next(iter(loaders[0]))
    assert batch["images"].shape == (7, 3, 32, 32)
    everything = CorruptedData(DigitsData(["hard"])).predict_dataloader()
    assert len(everything) == len(CORRUPTIONS) * 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"corruptions": ["sepia"]}, "`corruptions` are among gaussian_noise, .*sepia"),
        ({"severities": [0]}, "among 1 to 5"),
        ({"severities": []}, "Give at least one"),
    ],
)
def test_refuses_what_there_is_not(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CorruptedData(DigitsData(["hard"]), **options)
