"""Any images, corrupted on the fly."""

from collections.abc import Iterator

import torch

from featinv_pl.data.images.corruptions import corrupt
from featinv_pl.data.images.sources import ImageSample, ImageSource
from featinv_pl.types import from_uint8, key_hash, to_uint8


class CorruptedImages(ImageSource):
    """The images of another source, corrupted: `<source>-corrupted/<corruption>/<severity>`.

    The random part belongs to an image's key, so it is the same in every run, order and process.

    Args:
        images: The other source.
        corruption: A name in `CORRUPTIONS`.
        severity: 1 to 5.
    """

    def __init__(self, images: ImageSource, corruption: str, severity: int) -> None:
        self.images, self.corruption, self.severity = images, corruption, severity
        self.source = f"{images.source}-corrupted/{corruption}/{severity}"
        self.preparation = f"{images.preparation}; {corruption} of severity {severity}, generated"
        self.num_images, self.views, self.classes = images.num_images, images.views, images.classes

    def names(self) -> Iterator[tuple[str, str]]:
        return self.images.names()

    def __getitem__(self, item: int) -> ImageSample:
        sample = self.images[item]
        pixels = to_uint8(sample["images"]).permute(1, 2, 0).numpy()
        corrupted = corrupt(pixels, self.corruption, self.severity, seed=key_hash(sample["key"]))
        images = from_uint8(torch.from_numpy(corrupted).permute(2, 0, 1))
        return {**sample, "images": images, "source": self.source}
