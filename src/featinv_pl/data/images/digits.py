"""Handwritten digits that come with scikit-learn: 1,797 real images and no download."""

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from featinv_pl.data.images.corruptions import check_corruption, corrupt
from featinv_pl.data.images.datamodule import ImageData
from featinv_pl.data.images.sources import ImageSample, ImageSource
from featinv_pl.errors import UserError

IMAGE_SIZE = 32
TEST_SIZE, VAL_SIZE, HARD_SIZE = 360, 100, 60
SPLITS = ("train", "val", "clean", "hard", "adversarial")


class DigitImages(ImageSource):
    """One source of digits.

    Args:
        source: `train`, `val`, `clean` (the test images), `hard` (those on which another classifier errs or is least
            sure), `adversarial` (those to be attacked by `AdversarialExtraction`), `corrupted/<corruption>/<severity>`.
        limit: At most so many images, the first of a fixed random order.
    """

    classes = tuple(map(str, range(10)))

    def __init__(self, source: str, limit: int | None = None) -> None:
        kind, *corruption = source.split("/")
        corrupted = kind == "corrupted" and len(corruption) == 2 and corruption[1].isdecimal()
        if not corrupted and source not in SPLITS:
            known = ", ".join((*SPLITS, "corrupted/<corruption>/<severity>"))
            raise UserError(f"`sources`: '{source}' is not a source of digits. Choose among {known}.")
        self.corruption = (corruption[0], int(corruption[1])) if corrupted else None
        if self.corruption:
            check_corruption(*self.corruption)
        self.source, self.preparation = source, f"{IMAGE_SIZE} px, {source}"
        self.indices = split_indices()["clean" if corrupted else kind][:limit]
        self.num_images = len(self.indices)

    def names(self) -> Iterator[tuple[str, str]]:
        return ((f"{index:04d}", str(digits().target[index])) for index in self.indices)

    def __getitem__(self, item: int) -> ImageSample:
        index = int(self.indices[item])
        image, label = digit_images()[index], int(digits().target[index])
        if self.corruption is not None:
            image = corrupt(image, *self.corruption, seed=index)
        pixels = torch.tensor(image).permute(2, 0, 1)
        return ImageSample(pixels, label, str(label), self.source, f"{index:04d}")


class DigitsData(ImageData):
    """Digits, as batches of images.

    Args:
        sources: What `predict` reads, one after the other; `DigitImages` lists the names.
        limit: At most so many images of each corrupted source.
        batch_size: Images per batch.
    """

    def __init__(self, sources: list[str] | None = None, limit: int | None = None, batch_size: int = 64) -> None:
        predicted = [DigitImages(source, limit if source.startswith("corrupted") else None) for source in sources or []]
        super().__init__(predicted, batch_size, train=DigitImages("train"), val=DigitImages("val"))


# Below, scikit-learn is imported where it is needed: it takes a tenth of every other command's start.


@functools.cache
def digits() -> Any:
    """The data set as scikit-learn gives it: 8x8 images with values 0 to 16."""
    from sklearn.datasets import load_digits

    return load_digits()


@functools.cache
def digit_images() -> NDArray[np.uint8]:
    """All digits as (1797, 32, 32, 3) bytes."""
    grey = map(Image.fromarray, (digits().images * 255 / 16).round().astype(np.uint8))
    large = [np.asarray(image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)) for image in grey]
    return np.repeat(np.stack(large)[..., None], 3, axis=-1)


@functools.cache
def split_indices() -> dict[str, NDArray[np.int64]]:
    """The fixed stratified split, each part in a fixed random order.

    Hard test images get the least probability of their label from a discriminant analysis of raw pixels: adversarial
    filtration by another model, as ImageNet-A was made (Hendrycks et al., arXiv 1907.07174).
    """
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.model_selection import train_test_split

    pixels, target = digits().data / 16, digits().target
    rest, test = train_test_split(np.arange(len(target)), test_size=TEST_SIZE, stratify=target, random_state=0)
    train, val = train_test_split(rest, test_size=VAL_SIZE, stratify=target[rest], random_state=0)
    other = LinearDiscriminantAnalysis().fit(pixels[rest], target[rest])
    confidence = other.predict_proba(pixels[test])[np.arange(len(test)), target[test]]
    hard = test[np.sort(np.argsort(confidence, kind="stable")[:HARD_SIZE])]
    return {"train": train, "val": val, "clean": test, "adversarial": test, "hard": hard}
