"""How folders of images are laid out: which sources a folder holds, and which class each image belongs to.

A class is a folder, and its images lie at any depth below it. A source holds either class folders, or images of no
class. Folders that hold sources instead of images, such as those of ImageNet-C, are told by what they contain: folders
named by wnid are classes, so what holds them is a source; `train`, `val`, `test` and the like are sources beside each
other, as are corruptions and their severities. Where both readings remain possible, the folder is refused.
"""

import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from featinv_pl.data.images.severities import LEVELS, SEVERITIES
from featinv_pl.decoding import SUFFIXES
from featinv_pl.errors import UserError
from featinv_pl.files import read_text
from featinv_pl.types import key_hash

WNID = re.compile(r"n\d{8}")
SPLITS = frozenset({"train", "training", "val", "valid", "validation", "dev", "test", "testing"})
LITTER = frozenset({"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"})
UNREAD = frozenset({".heic", ".heif", ".avif", ".jxl", ".jp2", ".tga", ".exr", ".psd", ".dng", ".cr2", ".nef", ".arw"})
READ = ", ".join(sorted(SUFFIXES))
ANNOTATIONS = "val_annotations.txt"  # of Tiny ImageNet, whose validation images lie in one folder
NO_CLASS = ""
PARTS = ("train", "val", "test")


class Folder(NamedTuple):
    """A folder: names of the images directly in it, and the folders that hold images at any depth, both sorted."""

    path: Path
    images: list[str]
    folders: list["Folder"]

    def below(self, prefix: str = "") -> Iterator[str]:
        """Paths of all images at any depth, relative to this folder."""
        yield from (f"{prefix}{image}" for image in self.images)
        for folder in self.folders:
            yield from folder.below(f"{prefix}{folder.path.name}/")


def find_sources(name: str, root: Path) -> dict[str, Path]:
    """Sources at or below a folder, by name: `<name>/<path below>` where there are several.

    Raises:
        UserError: There is no such folder, no image in it, or more than one way to read it.
    """
    paths = _sources(_read(root))
    return {name if path == root else f"{name}/{path.relative_to(root).as_posix()}": path for path in paths}


def labelled_images(root: Path, per_class: int | None = None) -> list[tuple[str, str]]:
    """Images of a source by path below the root, with their classes, in the order of classes and paths.

    `per_class` keeps the first of each class, which everybody can repeat: of ImageNet's validation set, 10 give the
    usual 10,000 images. A folder of several sources is refused.
    """
    folder = _read(root)
    sources = _sources(folder)
    if sources != [root]:
        named = ", ".join(f"'{path.relative_to(root)}'" for path in sources[:5])
        raise UserError(f"`data`: '{root}' holds several sets of images ({named}). Give one of them.")
    if (root / ANNOTATIONS).is_file() and len(folder.folders) == 1:
        lines = read_text(root / ANNOTATIONS, "`data`", "Copy it again.").splitlines()
        table = dict(line.split("\t")[:2] for line in lines if "\t" in line)
        images = [(path, table.get(path.rpartition("/")[2], NO_CLASS)) for path in folder.below()]
    else:
        images = [(image, NO_CLASS) for image in folder.images]
        images += [(path, one.path.name) for one in folder.folders for path in one.below(f"{one.path.name}/")]
    classes: dict[str, list[str]] = {}
    for path, name in images:
        classes.setdefault(name, []).append(path)
    return [(path, name) for name in in_order(classes) for path in sorted(classes[name])[:per_class]]


def divided(images: list[tuple[str, str]], held_out: float, part: str) -> list[tuple[str, str]]:
    """The images of one part: `val` and `test` hold a share of each class, at least one image, and `train` the rest.

    An image's place among those of its class is a function of its path alone, so few change their part when others are
    added.

    Args:
        images: Paths with classes, as `labelled_images` gives them.
        held_out: The share of `val`, and as much of `test`.
        part: `train`, `val` or `test`.

    Raises:
        UserError: A class has less than three images.
    """
    classes: dict[str, list[str]] = {}
    for path, name in images:
        classes.setdefault(name, []).append(path)
    if few := [name for name, paths in classes.items() if len(paths) < len(PARTS)]:
        raise UserError(
            f"`folder`: the class '{few[0]}' has {len(classes[few[0]])} images, and needs at least {len(PARTS)}: to "
            "train on, to validate on and to test with. Add some, or remove the class."
        )
    chosen: dict[str, str] = {}
    for name, paths in classes.items():
        paths.sort(key=key_hash)
        share = max(1, min(round(held_out * len(paths)), (len(paths) - 1) // 2))
        parts = (paths[2 * share :], paths[:share], paths[share : 2 * share])
        chosen |= dict.fromkeys(parts[PARTS.index(part)], name)
    return [(path, name) for path, name in images if path in chosen]


def in_order(classes: Collection[str]) -> list[str]:
    """Names of classes by number where all are numbers, otherwise sorted: the order in which they are numbered."""
    return sorted(classes, key=(lambda name: (int(name), name)) if all(map(str.isdecimal, classes)) else None)


def first_of_each(classes: Sequence[str], per_class: int | None) -> Iterator[int]:
    """The numbers of the first images of each class."""
    seen: Counter[str] = Counter()
    for number, name in enumerate(classes):
        seen[name] += 1
        if per_class is None or seen[name] <= per_class:
            yield number


def _read(root: Path) -> Folder:
    if not root.is_dir():
        raise UserError(f"`data`: there is no folder '{root}'. Check the path.")
    folder = _folder(root, ())
    if not folder.images and not folder.folders:
        if any(root.glob("*.tar")):
            raise UserError(f"`data`: '{root}' holds tars. Give them as '{root}/*.tar', or a range of their numbers.")
        raise UserError(f"`data`: no images in '{root}' or below '{root}/<class>/'. Known suffixes: {READ}.")
    return folder


def _folder(path: Path, above: tuple[Path, ...]) -> Folder:
    above = (*above, path.resolve())
    if above[-1] in above[:-1]:
        raise UserError(f"`data`: '{path}' is a link to a folder that contains it. Remove it.")
    images, folders = [], []
    for name in sorted(os.listdir(path)):
        suffix = os.path.splitext(name)[1].lower()
        if name.startswith(".") or name in LITTER:
            continue
        if os.path.isdir(path / name):
            folders.append(_folder(path / name, above))
        elif suffix in UNREAD:
            raise UserError(f"`data`: '{path / name}' is of a type that is not read. Convert or remove it ({READ}).")
        elif suffix in SUFFIXES:
            images.append(name)
    return Folder(path, images, [folder for folder in folders if folder.images or folder.folders])


def _sources(folder: Folder) -> list[Path]:
    """The sources at or below a folder."""
    if folder.images and folder.folders:
        raise UserError(
            f"`data`: '{folder.path}' holds images, such as '{folder.images[0]}', beside folders of images, such as "
            f"'{folder.folders[0].path.name}'. Move the images or the folders elsewhere."
        )
    if _holds_sources(folder):
        return [path for one in folder.folders for path in _sources(one)]
    return [folder.path]


def _holds_sources(folder: Folder) -> bool:
    names = {one.path.name for one in folder.folders}
    wnids = {name for name in names if WNID.fullmatch(name)}
    if wnids and wnids != names:
        odd = folder.path / min(names - wnids)
        raise UserError(f"`data`: '{odd}' is not named by wnid as '{min(wnids)}' beside it is. Move or rename it.")
    if wnids or not names:
        return False
    splits = {name for name in names if name.lower() in SPLITS}
    severities = folder.path.name in SEVERITIES and names <= {*map(str, LEVELS)}
    if splits == names or severities or any(map(_has_wnids, folder.folders)):
        return True
    deep = [one for one in folder.folders if not one.images]
    if not deep or (len(deep) < len(names) and not splits & {one.path.name for one in deep}):
        return False
    if len(deep) == len(names) and not splits and len({one.path.name for outer in deep for one in outer.folders}) == 1:
        return False  # such as `<class>/images/`
    if len(names) == 1 or names <= SEVERITIES.keys():
        return True
    outer, inner = deep[0].path.name, deep[0].folders[0].path.name
    raise UserError(
        f"`data`: '{folder.path}' can be read in two ways: '{outer}' is a class, or a set of images with a class "
        f"'{inner}'. Move the images up into '{outer}', or give each set a name: --data.predict.{outer}={deep[0].path}."
    )


def _has_wnids(folder: Folder) -> bool:
    return any(WNID.fullmatch(one.path.name) or _has_wnids(one) for one in folder.folders)
