"""Ways to spoil a file that was valid: each function changes the file at a path."""

import io
import json
import os
import pickle
import random
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from conftest import Runs
from shard_sets import rewrite

Spoil = Callable[[Path], object]
Spoils = dict[str, Spoil]

DEEP = 100_000
RUNS = Runs(Path("../ran"))  # as seen from where the command runs
LEAVES: tuple[Any, ...] = (
    None, True, -1, 0, 2**31, 10**12, 1e308, float("nan"), float("inf"), "", "\0", "a\nb", "../../outside",
    "/etc/passwd", "ü" * 10_000, [], {}, [[]], [10**9] * 3, {"a": {"b": []}},
)  # fmt: skip


def holds(data: bytes) -> Spoil:
    return lambda path: path.write_bytes(data)


def instead(make: Callable[[Path], object]) -> Spoil:
    def spoil(path: Path) -> None:
        path.unlink(missing_ok=True)
        make(path)

    return spoil


def links_to(target: str) -> Spoil:
    return instead(lambda path: path.symlink_to(target))


ANY: Spoils = {
    "empty": holds(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3]),
    "pickle": holds(pickle.dumps(RUNS)),
    "not text": holds(b"\xff\xfe\x80 \x00" * 40),
    "missing": Path.unlink,
    "folder": instead(Path.mkdir),
    "endless pipe": instead(os.mkfifo),
    "link to endless zeros": links_to("/dev/zero"),
    "link elsewhere": links_to("/etc/passwd"),
    "link to itself": instead(lambda path: path.symlink_to(path.name)),
}


def random_damage(path: Path, rng: random.Random) -> None:
    """Flip a bit, cut, zero, remove, insert or repeat some bytes."""
    data = path.read_bytes()
    place, amount = rng.randrange(len(data)), rng.randrange(1, 600)
    head, middle, tail = data[:place], data[place : place + amount], data[place + amount :]
    flipped = bytes([middle[0] ^ 1 << rng.randrange(8)]) + middle[1:]
    inserted = rng.randbytes(amount) + middle
    others = [flipped, b"", bytes(len(middle)), inserted, 2 * middle]
    path.write_bytes(rng.choice([head, *(head + other + tail for other in others)]))


# JSON

JSONS: Spoils = {
    "deep": holds(b"[" * DEEP + b"]" * DEEP),
    "many digits": holds(b"9" * DEEP),
    "not an object": holds(b"[]"),
    "nothing in it": holds(b"{}"),
    "infinite": holds(b'{"a": Infinity}'),
}


def puts(where: Sequence[str], value: Any) -> Spoil:
    """Another value at a place of a JSON document."""

    def spoil(path: Path) -> None:
        contents = part = json.loads(path.read_text())
        for number, name in enumerate(where, 1):
            key = int(name) if isinstance(part, list) else name
            if number == len(where):
                part[key] = value
            part = part[key]
        path.write_text(json.dumps(contents))

    return spoil


def values(table: dict[str, Sequence[Any]]) -> Spoils:
    """From places in a document, and the values that are put there."""
    rows = ((where, value) for where, several in table.items() for value in several)
    return {f"{where} = {value!r}"[:60]: puts(where.split("/"), value) for where, value in rows}


def random_value(path: Path, rng: random.Random) -> None:
    """Another value at any place of a JSON document."""

    def places(part: Any, where: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
        for key, one in part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ():
            yield (*where, str(key))
            yield from places(one, (*where, str(key)))

    puts(rng.choice([*places(json.loads(path.read_text()))]), rng.choice(LEAVES))(path)


# Files of torch and safetensors


def saves(contents: Any, legacy: bool = False) -> Spoil:
    return lambda path: torch.save(contents, path, _use_new_zipfile_serialization=not legacy)


def loads(change: Callable[[dict[str, Any]], Any]) -> Spoil:
    """What is loaded, changed and saved again: complete by all its checksums."""
    return lambda path: torch.save(change(torch.load(path, weights_only=True)), path)


def first_weight(change: Callable[[torch.Tensor], Any]) -> Spoil:
    def one(checkpoint: dict[str, Any]) -> dict[str, Any]:
        name, value = next(iter(checkpoint["state_dict"].items()))
        return {**checkpoint, "state_dict": {**checkpoint["state_dict"], name: change(value)}}

    return loads(one)


def rezipped(path: Path, change: Callable[[str, bytes], bytes], compression: int = 0) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression, compresslevel=1) as archive:
        for name, data in entries.items():
            archive.writestr(name, change(name, data))


def zip_bomb(path: Path) -> None:
    zeros = bytes(1 << 26)
    rezipped(path, lambda name, data: zeros if name.endswith("data/0") else data, zipfile.ZIP_DEFLATED)


def huge_storage(path: Path) -> None:
    """A pickle that says its storage has 2^40 values, where the first two-byte integer is a number of elements."""

    def change(name: str, data: bytes) -> bytes:
        place = data.index(b"M") if name.endswith("data.pkl") else -1
        return data if place < 0 else data[:place] + b"\x8a\x06" + (2**40).to_bytes(6, "little") + data[place + 3 :]

    rezipped(path, change)


RUN_CODE: Spoils = {
    "pickle in a zip": saves({"state_dict": {"a": RUNS}}),
    "pickle of before": saves({"state_dict": {"a": RUNS}}, legacy=True),
    "pickle beside weights": loads(lambda contents: {**contents, "extra": RUNS}),
}
ARCHIVES: Spoils = {"zip bomb": zip_bomb, "storage of 2^40 values": huge_storage}
WEIGHTS: Spoils = {
    "10^12 values in 4 bytes": first_weight(lambda one: torch.zeros(1).expand(10**6, 10**6)),
    "another shape": first_weight(lambda one: torch.zeros(3, 3)),
    "complex numbers": first_weight(lambda one: one.to(torch.complex64)),
    "sparse": first_weight(lambda one: one.to_sparse()),
    "on meta": first_weight(lambda one: one.to("meta")),
    "NaN": first_weight(lambda one: torch.full_like(one, torch.nan)),
    "a word": first_weight(lambda one: "word"),
}
CONTENTS: Spoils = {
    "a list": loads(lambda contents: [contents]),
    "a tensor alone": saves(torch.zeros(3)),
    "nothing in it": saves({}),
    "no weights": loads(lambda contents: {**contents, "state_dict": {}}),
    "names that are numbers": loads(lambda contents: {**contents, "state_dict": {1: torch.zeros(1)}}),
}


def header(text: bytes, length: int | None = None) -> Spoil:
    """A header of safetensors, before the bytes of three values."""
    return holds(struct.pack("<Q", length or len(text)) + text + bytes(12))


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Spoil:
    return lambda path: save_file({name: one.contiguous() for name, one in change(load_file(path)).items()}, path)


HEADERS: Spoils = {
    "header of 2^60 bytes": header(b"{}", 2**60),
    "header: deep": header(b'{"a":' * DEEP),
    "header: 10^18 values": header(
        b'{"a":{"dtype":"F32","shape":[1000000000,1000000000],"data_offsets":[0,4000000000000000000]}}'
    ),
    "header: overlapping": header(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}'
    ),
    "header: unknown dtype": header(b'{"a":{"dtype":"X9","shape":[12],"data_offsets":[0,12]}}'),
}
TENSORS: Spoils = {
    "a tensor missing": tensors(lambda found: dict(list(found.items())[:-1])),
    "other shapes": tensors(lambda found: {name: one[None] for name, one in found.items()}),
    "NaN": tensors(lambda found: {name: one * torch.nan for name, one in found.items()}),
}

# Shards, whose members an author writes together with their checksums


def npy(dtype: str, shape: str, data: bytes = b"") -> bytes:
    """An array whose header says what it likes."""
    text = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}"
    text += " " * (-(len(text) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + data


def member(suffix: str, data: bytes) -> Spoil:
    """Another member in every sample of a shard; its index agrees."""

    return lambda path: rewrite(path, lambda name, content: data if name.endswith(f".{suffix}") else content)


def tar_header(path: Path, **fields: Any) -> None:
    """Other values in the header of the first member, to whoever reads the tar as one."""
    data = path.read_bytes()
    info = tarfile.TarInfo.frombuf(data[: tarfile.BLOCKSIZE], "utf-8", "strict")
    for name, value in fields.items():
        setattr(info, name, value)
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT)[: tarfile.BLOCKSIZE] + data[tarfile.BLOCKSIZE :])


MEMBERS: Spoils = {
    "meta: deep": member("json", b"[" * DEEP + b"]" * DEEP),
    "meta: label of 5,000 digits": member("json", b'{"label": ' + b"1" * 5000 + b', "source": "s", "key": "k"}'),
    "array: pickled": member("features.npy", npy("'|O'", "(1,)", pickle.dumps(RUNS))),
    "array: 10^12 values": member("features.npy", npy("'<f2'", "(1000000, 1000000)", bytes(64))),
    "array: negative shape": member("features.npy", npy("'<f2'", "(-8, 4, 4)", bytes(256))),
    "array: NaN": member("features.npy", npy("'<f2'", "(8, 4, 4)", b"\x00\x7e" * 128)),
    "array: code for a dtype": member("latent.npy", npy("__import__('os').system('touch ../ran')", "(1,)")),
    "array: deep header": member("latent.npy", npy("[" * 9000 + "]" * 9000, "(1,)")),
    "tar: huge member": partial(tar_header, size=2**60),
    "tar: name of a path": partial(tar_header, name="../../outside"),
    "tar: link": partial(tar_header, type=tarfile.SYMTYPE, linkname="/etc/passwd"),
}

# Pictures


def png(width: int, height: int, data: bytes | None = None) -> bytes:
    """A black picture of a few kilobytes, whatever its size."""
    packed = zlib.compress(bytes((width // 8 + 2) * min(height, 2000)), 9) if data is None else data
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in ((b"IHDR", header), (b"IDAT", packed), (b"IEND", b""))
    )


Image.new("RGB", (64, 64)).save(buffer := io.BytesIO(), "JPEG")
JPEG = buffer.getvalue()
SIZE = JPEG.index(b"\xff\xc0") + 5
BAD_PICTURES: dict[str, bytes] = {
    "50,000 x 50,000 pixels": png(50_000, 50_000),
    "a line of 2^31 - 1 pixels": png(2**31 - 1, 1, b""),
    "JPEG of 65,500 x 65,500": JPEG[:SIZE] + struct.pack(">HH", 65_500, 65_500) + JPEG[SIZE + 4 :],
    "PNG of 0 x 0": png(0, 0),
    "PNG without data": png(8, 8, zlib.compress(b"")),
    "PNG chunk of 2^31 bytes": b"\x89PNG\r\n\x1a\n" + b"\x7f\xff\xff\xffIHDR",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(%pipe%touch ../ran) (w) file\n",
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "half a JPEG": JPEG[:300],
    "TIFF that points to itself": b"II*\0\x08\0\0\0" + b"\x01\0\0\x01\x04\0\x01\0\0\0\x01\0\0\0" + b"\x08\0\0\0",
    "BMP of -2^31 rows": b"BM" + bytes(12) + struct.pack("<IiiHHIIiiII", 40, 8, -(2**31), 1, 24, 0, 0, 0, 0, 0, 0),
    "WebP without data": b"RIFF\xff\xff\xff\x7fWEBPVP8 ",
}
PICTURES: Spoils = {name: holds(data) for name, data in BAD_PICTURES.items()}
