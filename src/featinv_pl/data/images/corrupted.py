"""Any images, corrupted on the fly."""

from collections.abc import Iterator

import torch

from featinv_pl.data.images.corruptions import CORRUPTIONS, corrupt
from featinv_pl.data.images.datamodule import ImageData, ImageSample, ImageSource
from featinv_pl.data.images.severities import SEVERITIES
from featinv_pl.errors import UserError
from featinv_pl.types import from_uint8, key_hash, to_uint8

LEVELS = len(next(iter(SEVERITIES.values()))[0])


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
        self.views, self.classes = images.views, images.classes

    @property
    def num_images(self) -> int:
        """As many as the other source has."""
        return self.images.num_images

    def names(self) -> Iterator[tuple[str, str]]:
        """Those of the other source."""
        return self.images.names()

    @property
    def preparation(self) -> str:
        """That of the other source, then the corruption."""
        return f"{self.images.preparation}; {self.corruption} of severity {self.severity}, generated"

    def __getitem__(self, item: int) -> ImageSample:
        sample = self.images[item]
        pixels = to_uint8(sample["images"]).permute(1, 2, 0).numpy()
        corrupted = corrupt(pixels, self.corruption, self.severity, seed=key_hash(sample["key"]))
        images = from_uint8(torch.from_numpy(corrupted).permute(2, 0, 1))
        return {**sample, "images": images, "source": self.source}


class CorruptedData(ImageData):
    """What another data module gives to `predict`, by every corruption at every severity.

    Args:
        data: The other data module, such as folders of images.
        corruptions: Names; by default the 15 of ImageNet-C and its 4 for validation.
        severities: 1 to 5.
    """

    def __init__(
        self,
        data: ImageData,
        corruptions: list[str] | None = None,
        severities: list[int] | None = None,
    ) -> None:
        corruptions = list(CORRUPTIONS) if corruptions is None else corruptions
        severities = list(range(1, LEVELS + 1)) if severities is None else severities
        unknown = [name for name in corruptions if name not in CORRUPTIONS]
        if unknown:
            raise UserError(
                f"--data.corruptions: there is no corruption '{unknown[0]}'. Choose among: {', '.join(CORRUPTIONS)}."
            )
        if not corruptions or not set(severities) <= set(range(1, LEVELS + 1)) or not severities:
            raise UserError(f"--data.severities are among 1 to {LEVELS}, and are {severities}. Give at least one.")

        predicted = [
            CorruptedImages(images, corruption, severity)
            for images in data.predicted
            for corruption in corruptions
            for severity in severities
        ]
        super().__init__(predicted, data.batch_size, data.num_workers)
