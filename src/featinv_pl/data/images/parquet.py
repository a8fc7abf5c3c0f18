"""Images of Hugging Face datasets: parquet files, local or on the hub, read by the library `datasets`."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from featinv_pl.data.images.layouts import NO_CLASS, first_of_each
from featinv_pl.data.images.sources import FileImages
from featinv_pl.decoding import NoImageError, open_image
from featinv_pl.errors import UserError, reason
from featinv_pl.masking import masked

SUFFIX = ".parquet"
IMAGE, LABEL = ("image", "img", "jpg", "png", "webp"), ("label", "labels", "cls")


class ParquetImages(FileImages):
    """Images of parquet files, in their order; a key is the row's number. `FileImages` and `FolderData` have more.

    Args:
        place: Paths, or `hf://datasets/...`, with `*`.
        per_class: Only so many images of each class, the first.
        cache: Where the rows are kept as the library reads them.
        label: The column of the label, if it has an unusual name.
        classes: Names of the classes, in place of those that the files give to their numbers.
        option: The option that named the place, for errors.
    """

    def __init__(
        self,
        place: str,
        source: str,
        image_size: int,
        crop_pct: float = 1.0,
        per_class: int | None = None,
        cache: Path = Path(),
        label: str | None = None,
        classes: Sequence[str] | None = None,
        option: str = "`data`",
        **options: Any,
    ) -> None:
        rows = _load(place, cache, option)
        image = _column(rows, IMAGE, "an image", place, option)
        self._column, self._rows = image, _undecoded(rows, image)
        names, numbers = None, [NO_CLASS] * len(rows)
        if label is not None or any(name in rows.features for name in LABEL):
            column = _column(rows, (label,) if label is not None else LABEL, "a label", place, option)
            names = classes or getattr(rows.features[column], "names", None)
            numbers = [_class(value, names) for value in rows[column]]
        kept = [*first_of_each(numbers, per_class)]
        self._kept = kept
        super().__init__(
            [(f"{row:09d}", numbers[row]) for row in kept], source, image_size, crop_pct, classes=names, **options
        )

    def open(self, index: int) -> Image.Image:
        found = self._rows[self._kept[index]][self._column]
        data, path = (found.get("bytes"), found.get("path")) if isinstance(found, dict) else (found, None)
        if data is not None:
            return open_image(data)
        if path is None:
            raise NoImageError("the row has no image")
        return open_image(Path(path))


def is_parquet(place: str | Path) -> bool:
    """Whether a place is that of parquet files, by its suffix."""
    return os.fspath(place).endswith(SUFFIX)


def _load(place: str, cache: Path, option: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{option}: parquet files need an extra: pip install 'featinv-pl[datasets]'.") from error
    try:
        return datasets.load_dataset("parquet", data_files=place, split="train", cache_dir=str(cache.expanduser()))
    except Exception as error:  # the library, the hub and the file system have errors of their own
        why = f"{type(error).__name__}: {masked(reason(error))}"
        advice = "Check the path."
        if "://" in place:
            advice = "Check name and network; for a gated one accept its terms, and set HF_TOKEN in the environment."
        raise UserError(f"{option}: '{masked(place)}' cannot be read as a data set ({why}). {advice}") from error


def _undecoded(rows: Any, image: str) -> Any:
    """The rows with images as bytes: they are decoded as all others are."""
    import datasets

    if isinstance(rows.features[image], datasets.Image):
        rows = rows.cast_column(image, datasets.Image(decode=False))
    return rows.select_columns([image])


def _column(rows: Any, names: Sequence[str], what: str, place: str, option: str) -> str:
    found = [name for name in names if name in rows.features]
    if not found:
        raise UserError(
            f"{option}: '{masked(place)}' has no column of {what} ({', '.join(names)}), but {', '.join(rows.features)}."
        )
    return found[0]


def _class(value: Any, names: Sequence[str] | None) -> str:
    """The name of a class by what a row says, which may be nothing, or -1 as in test sets without labels."""
    if value is None or value == -1:
        return NO_CLASS
    return names[value] if names and isinstance(value, int) and value < len(names) else str(value)
