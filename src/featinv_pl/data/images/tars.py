"""Images in WebDataset tars: members that share a name are a sample, grouped as that library does.

The place of every sample is known before the first is read, so that tars are read as folders are: each sample exactly
once by any number of processes, in views, corrupted or shuffled. What is compressed or lies at an address is first
fetched into a cache, as a plain tar.
"""

import glob
import gzip
import hashlib
import json
import logging
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
from filelock import FileLock
from PIL import Image
from tqdm import tqdm

from featinv_pl.bars import style
from featinv_pl.data.addresses import CHUNK, READABLE, attempted, is_remote, open_address
from featinv_pl.data.images.layouts import NO_CLASS, first_of_each
from featinv_pl.data.images.sources import FileImages
from featinv_pl.decoding import SUFFIXES, NoImageError, open_image
from featinv_pl.errors import UserError, reason
from featinv_pl.files import atomic
from featinv_pl.masking import MASK, masked

log = logging.getLogger(__name__)

TARS = re.compile(r"\.(tar|tar\.gz|tgz)[}\]]*$")
COMPRESSED = re.compile(r"(\.tar\.gz|\.tgz)$")
IMAGES = ("jpg", "jpeg", "png", "webp", *sorted(suffix[1:] for suffix in SUFFIXES))
LABELS = "cls;json.label;json.cls;txt"
META = re.compile(r"__[^/]*__($|/)")  # what webdataset leaves out
LARGEST_LABEL, LARGEST_IMAGE = 1 << 20, 1 << 29  # bytes of a member
LARGEST_NUMBER = 1_000_000  # of a class
FETCHES = 4  # at a time
RESERVE = 1 << 30  # bytes of the cache's disk that stay free


class Member(NamedTuple):
    """The place of a member in its tar."""

    name: str
    offset: int
    size: int


class Sample(NamedTuple):
    """An image of a tar: its place, its class, and why it cannot be read, if so."""

    image: Member
    class_name: str = NO_CLASS
    unreadable: str = ""


class TarImages(FileImages):
    """Images of WebDataset tars, in the order of the tars and their members.

    Keys are `<tar>/<member>`. `FileImages` and `FolderData` have more arguments.

    Args:
        place: Paths or addresses, with brace ranges, or paths with `*`.
        per_class: Only so many images of each class, the first by the member's name.
        cache: Where tars are kept that are compressed or lie at an address.
        label: Where a sample's class is found: the first of these members, or fields of its `json`, that it has; by
            default `cls;json.label;json.cls;txt`.
        classes: Names of the classes, which numbers in tars count.
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
        places = expand(place, option)
        if not places:
            raise UserError(f"{option}: no file is called '{place}'. Check the path.")
        self._tars = _fetched(places, cache, source, option)
        fields = [field for field in (LABELS if label is None else label).split(";") if field]
        found = [
            (number, sample)
            for number, (path, one) in enumerate(zip(self._tars, places, strict=True))
            for sample in read_samples(path, masked(one), fields, option)
        ]
        if all(sample.unreadable for _, sample in found):
            such = f", but members such as '{found[0][1].image.name}'" if found else ""
            raise UserError(
                f"{option}: '{masked(place)}' holds no images{such}. A sample is NAME.jpg (or jpeg, png, webp) beside "
                "NAME.cls, NAME.json or NAME.txt."
            )
        names = _named({sample.class_name for _, sample in found} - {NO_CLASS}, classes, option)
        if per_class is not None:
            order = sorted(range(len(found)), key=lambda index: found[index][1].image.name)
            first = first_of_each([found[index][1].class_name for index in order], per_class)
            found = [found[index] for index in sorted(order[place] for place in first)]
        files = [(f"{_name(places[number])}/{one.image.name}", names.get(one.class_name, "")) for number, one in found]
        if classes is None and names and all(map(str.isdecimal, names)):  # which are labels, whatever is missing
            classes = tuple(map(str, range(1 + max(map(int, names)))))
        super().__init__(files, source, image_size, crop_pct, classes=classes, **options)
        self._places = np.array([(number, one.image.offset, one.image.size) for number, one in found])
        self._unreadable = {index: one.unreadable for index, (_, one) in enumerate(found) if one.unreadable}

    def open(self, index: int) -> Image.Image:
        if index in self._unreadable:
            raise NoImageError(self._unreadable[index])
        number, offset, size = self._places[index].tolist()
        with self._tars[number].open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), size, offset) if size <= LARGEST_IMAGE else b""
        if len(data) != size:
            raise NoImageError(f"its {size} bytes are too many, or its tar ends before them")
        return open_image(data)


def is_tars(place: str | Path) -> bool:
    """Whether a place is that of tars, by its suffix; nothing else is read from addresses."""
    return is_remote(str(place)) or TARS.search(_path(str(place))) is not None


def expand(place: str, option: str) -> list[str]:
    """The paths or addresses of single tars."""
    from webdataset.shardlists import expand_urls  # here, because it takes its time, and loader workers need it not

    def error(text: str) -> UserError:
        return UserError(f"{option}: '{masked(place)}' {text}")

    scheme = place.partition(":")[0].lower()
    if is_remote(place) and scheme not in READABLE:
        raise error(f"is not a file, and of addresses only {', '.join(READABLE)} are read.")
    if MASK in place:
        raise error("was saved without its credentials. Give the address again, with them.")
    try:
        places = [place] if Path(place).is_file() else expand_urls(place)
    except (ValueError, KeyError) as wrong:  # of braces, and of variables
        raise error(f"cannot be expanded ({reason(wrong)}). A range is such as shard-{{000..099}}.tar.") from wrong
    places = [one for given in places for one in (sorted(glob.glob(given)) if "*" in given else [given])]
    if odd := next((one for one in places if not TARS.search(_path(one))), None):
        raise error(f"is no folder, and '{masked(odd)}' ends neither in .tar, .tar.gz or .tgz nor in .parquet.")
    names = [*map(_name, places)]
    if twice := {name for name in names if names.count(name) > 1}:
        raise error(f"names two tars '{min(twice)}', whose samples would share keys. Make them sources of their own.")
    return places


def read_samples(path: Path, shown: str, labels: Sequence[str], option: str) -> list[Sample]:
    """Find the samples of a plain tar.

    Raises:
        UserError: It is not a tar, or damaged where members begin, so that nobody can tell how many follow.
    """
    from webdataset.tariterators import group_by_keys

    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            groups = [*group_by_keys(_members(tar))]
            file.seek(tar.offset)
            if (block := file.read(tarfile.BLOCKSIZE)) != bytes(tarfile.BLOCKSIZE):  # where tarfile ends silently
                raise tarfile.ReadError(f"{'no member' if block else 'no end mark'} at byte {tar.offset}")
            read = partial(os.pread, file.fileno())
            samples = (parts for group in groups for parts in _parts(group))
            return [_sample(image, members, labels, read) for image, members in samples]
    except FileNotFoundError as error:
        raise UserError(f"{option}: there is no tar '{shown}'. Check the path.") from error
    except (tarfile.TarError, ValueError, EOFError, OSError) as error:
        raise UserError(f"{option}: '{shown}' is not a complete tar ({reason(error)}). Copy it again.") from error


def _members(tar: tarfile.TarFile) -> Iterator[dict[str, Any]]:
    """Members as webdataset groups them, with their places instead of their contents."""
    for info in tar:
        if info.isreg() and not META.match(info.name):
            member = Member(info.name.removeprefix("./"), info.offset_data, info.size)
            yield {"fname": member.name, "data": member, "__url__": ""}
        tar.members = []  # type: ignore[attr-defined]  # or it would keep them all


def _parts(group: dict[str, Any]) -> Iterator[tuple[Member | None, dict[str, Member]]]:
    """Image and members of each sample in a group: its names agree up to the first dot, as webdataset has it.

    Where none of them is an image by what follows that dot, dots belong to the names: `a.1.jpg`, `a.1.cls`, `a.2.jpg`.
    """

    def image(members: dict[str, Member]) -> Member | None:
        return next((members[suffix] for suffix in IMAGES if suffix in members), None)

    members = {suffix: member for suffix, member in group.items() if not suffix.startswith("__")}
    plain = {suffix: member for suffix, member in members.items() if "." not in suffix}
    dotted: dict[str, dict[str, Member]] = {}
    for suffix, member in members.items():
        stem, dot, last = suffix.rpartition(".")
        if dot:
            dotted.setdefault(stem, {})[last] = member
    if image(plain) or not any(map(image, dotted.values())):
        yield image(plain), members
    else:
        yield from ((image(own), {**plain, **own}) for own in dotted.values())


def _sample(
    image: Member | None, members: dict[str, Member], labels: Sequence[str], read: Callable[[int, int], bytes]
) -> Sample:
    if image is None:
        first = next(iter(members.values()))
        return Sample(first, unreadable=f"there is no image beside '{first.name}'")
    for label in labels:
        suffix, _, field = label.partition(".")
        member = members.get(suffix)
        if member is None:
            continue
        try:
            if member.size > LARGEST_LABEL:
                raise ValueError(f"it has {member.size} bytes")
            value = read(member.size, member.offset).decode().strip()
            value = json.loads(value).get(field) if field else value
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | str):
                raise ValueError(f"{value!r} is neither a number nor a name"[:200])
            return Sample(image, str(value))
        except (ValueError, AttributeError, RecursionError) as error:
            return Sample(image, unreadable=f"its label '{member.name}' cannot be read: {reason(error)}")
    return Sample(image)


def _named(found: set[str], classes: Sequence[str] | None, option: str) -> dict[str, str]:
    """Names of the classes that were found in tars, where numbers count `classes`."""
    numbers = {label: int(label) for label in found if label.isdecimal() and label not in (classes or ())}
    most = LARGEST_NUMBER if classes is None else len(classes)
    if numbers and (worst := max(numbers.values())) >= most:
        known = f"`classes` has {most} names" if classes is not None else f"more than {most} are not read"
        raise UserError(f"{option}: a sample has the label {worst}, but {known}, counted from 0. Check both.")
    return {label: classes[numbers[label]] if classes and label in numbers else label for label in found}


def _name(place: str) -> str:
    """The name of a tar, without what compresses it."""
    return COMPRESSED.sub(".tar", _path(place).rpartition("/")[2])


def _path(place: str) -> str:
    return urlsplit(place).path if is_remote(place) else place


def _fetched(places: Sequence[str], cache: Path, source: str, option: str) -> list[Path]:
    """Paths of plain tars."""
    plain = [Path(one) if not is_remote(one) and not COMPRESSED.search(one) else None for one in places]
    kept = [path or _cached(one, cache) for one, path in zip(places, plain, strict=True)]
    missing = [(one, path) for one, path in zip(places, kept, strict=True) if path not in plain and not path.is_file()]
    if missing:
        log.info("%s: %d tars are fetched into '%s', once.", source, len(missing), cache)
        with ThreadPoolExecutor(FETCHES) as pool:
            fetching = pool.map(lambda pair: _fetch(pair[0], pair[1], option), missing)
            for _ in tqdm(fetching, total=len(missing), **style(source, "tar")):
                pass
    return kept


def _cached(place: str, cache: Path) -> Path:
    """Where a tar is kept, by what it is, which a signature or a password in its address is not."""
    parts, path = urlsplit(place), Path(place)
    what = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    if path.is_file():
        what = f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}"
    return cache.expanduser() / f"{hashlib.sha256(what.encode()).hexdigest()[:16]}-{_name(place)}"


def _fetch(place: str, path: Path, option: str) -> None:
    """Fetch a tar, and decompress it; processes that want the same one wait for the first."""

    def copy() -> None:
        with open_address(place) if is_remote(place) else open(place, "rb") as raw, atomic(path) as partial:
            stream = gzip.GzipFile(fileobj=raw) if COMPRESSED.search(_path(place)) else raw
            with partial.open("wb") as file:
                while chunk := stream.read(CHUNK):
                    if shutil.disk_usage(path.parent).free < RESERVE:
                        raise UserError(f"`cache`: the disk of '{path.parent}' is full. Free space, or name another.")
                    file.write(chunk)

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        if path.is_file():
            return
        try:
            if is_remote(place) and not place.startswith("hf:"):  # whose client makes several attempts itself
                attempted(copy)
            else:
                copy()
        except UserError:
            raise
        except Exception as error:  # each protocol has errors of its own
            if not is_remote(place):
                what = f"cannot be decompressed ({reason(error)}). Copy it again."
                what = "is not there. Check the path." if isinstance(error, FileNotFoundError) else what
                raise UserError(f"{option}: '{place}' {what}") from error
            advice = "Check address and network."
            if getattr(getattr(error, "response", error), "status_code", getattr(error, "status", 0)) in (401, 403):
                advice = "Accept its terms on its page, if it has any, and set HF_TOKEN in the environment."
            why = masked(reason(error)).rstrip(".")
            raise UserError(f"{option}: '{masked(place)}' could not be fetched ({why}). {advice}") from error
