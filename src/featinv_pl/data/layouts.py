"""How folders of images are laid out, and which label that gives each image.

Class folders named by wnid have the index of their class among ImageNet's 1000, so that subsets such as
ImageNet-A, ImageNet-R and samples keep the classifier's numbers; folders named by number, as those of
ImageNet-V2, have that number; others are numbered in the order of their names. Images without class
folders have the label -1. Folders of such folders, as those of ImageNet-C, are several sources.
"""

import functools
import re
from collections import Counter
from pathlib import Path

from timm.data import ImageNetInfo

from featinv_pl.errors import UserError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
NO_LABEL = -1
WNID = re.compile(r"n\d{8}")


def find_sources(name: str, root: Path) -> dict[str, Path]:
    """Sources at or below a folder, by name: `<name>/<path below>` where there are several.

    A source is a folder that holds images, or class folders that do.
    """
    if not root.is_dir():
        raise UserError(f"--data: there is no folder '{root}' for the source '{name}'. Check the path.")
    folders = _folders(root)
    if _has_images(root) or any(_has_images(folder) for folder in folders):
        return {name: root}
    found: dict[str, Path] = {}
    for folder in folders:
        found |= _below(f"{name}/{folder.name}", folder)
    if not found:
        raise _no_images(root)
    return found


def _below(name: str, folder: Path) -> dict[str, Path]:
    try:
        return find_sources(name, folder)
    except _NoImagesError:  # such as a folder of notes beside those of images
        return {}


def labelled_images(root: Path) -> list[tuple[str, int]]:
    """Every image of a source by its path below the root, with its label, in the order of labels and names."""
    images = [(f"{folder}/{image}", label) for folder, label in class_labels(root) for image in _images(root / folder)]
    images = images or [(image, NO_LABEL) for image in _images(root)]
    if not images:
        raise _no_images(root)
    return images


def first_per_class(images: list[tuple[str, int]], limit: int) -> list[tuple[str, int]]:
    """The first images of each class: a selection that everybody can repeat.

    Of ImageNet's validation set, 10 per class give the usual 10,000 images.

    Args:
        images: In the order of labels and names, as `labelled_images` gives them.
        limit: Images per class; classes with fewer keep all that they have.
    """
    taken: Counter[int] = Counter()
    chosen = []
    for name, label in images:
        taken[label] += 1
        if taken[label] <= limit:
            chosen.append((name, label))
    return chosen


def class_labels(root: Path) -> list[tuple[str, int]]:
    """Names of the class folders with their labels, in the order of the labels; none if there are no folders."""
    names = [folder.name for folder in _folders(root)]
    if any(WNID.fullmatch(name) for name in names):
        classes = imagenet_classes()
        for name in names:
            if name not in classes:
                raise UserError(
                    f"--data: '{root / name}' is no class of ImageNet's 1000, and folders beside it are. Move it "
                    "elsewhere, or rename all if the classes are your own."
                )
        return sorted(((name, classes[name]) for name in names), key=lambda pair: pair[1])
    if names and all(name.isdecimal() for name in names):
        return sorted(((name, int(name)) for name in names), key=lambda pair: pair[1])
    return [(name, label) for label, name in enumerate(names)]


@functools.cache
def imagenet_classes() -> dict[str, int]:
    """ImageNet's 1000 classes by wnid."""
    return {wnid: label for label, wnid in enumerate(ImageNetInfo().label_names())}


class _NoImagesError(UserError):
    pass


def _no_images(root: Path) -> _NoImagesError:
    return _NoImagesError(
        f"--data: no images in '{root}' or below '{root}/<class>/'. Known suffixes: {', '.join(sorted(SUFFIXES))}."
    )


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _images(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def _has_images(folder: Path) -> bool:
    return any(path.suffix.lower() in SUFFIXES for path in folder.iterdir())
