"""Files that somebody has made to do harm: each function spoils one input that was valid."""

import hashlib
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from featinv_pl.data.shards.manifest import MANIFEST, index_path, to_json
from featinv_pl.nets.hub import SUMS, write_sums

Spoil = Callable[[Path], None]
"""Changes the input that lies in a folder."""

DEEP = 100_000
LEAVES: tuple[Any, ...] = (
    None, True, -1, 0, 2**31, 10**12, 10**400, 1e308, float("nan"), float("inf"), "", "\0", "a\nb", "../../outside",
    "/etc/passwd", "ü" * 10_000, [], {}, [[]], [10**9] * 3, {"a": {"b": []}},
)  # fmt: skip


class Runs:
    """A pickle that makes a file, `../ran` as seen from where the command runs, when it is loaded without care."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch ../ran",)


def within(name: str, spoil: Spoil) -> Spoil:
    """Spoil a file below the folder."""
    return lambda folder: spoil(folder / name)


# Any file


def empty(path: Path) -> None:
    path.write_bytes(b"")


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def missing(path: Path) -> None:
    path.unlink()


def a_pipe_that_never_ends(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def a_link_to_endless_zeros(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def a_link_to_somewhere_else(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/passwd")


def a_link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def a_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Runs()))


def not_text(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x80 \x00" * 40)


def huge_and_sparse(path: Path) -> None:
    """64 GB that take no space."""
    with path.open("r+b") as file:
        file.truncate(1 << 36)


ANY: tuple[Spoil, ...] = (
    empty,
    a_folder,
    missing,
    a_pipe_that_never_ends,
    a_link_to_endless_zeros,
    a_link_to_somewhere_else,
    a_link_to_itself,
    a_pickle,
    not_text,
    huge_and_sparse,
)


# Texts


def text(contents: str) -> Spoil:
    def write(path: Path) -> None:
        path.write_text(contents)

    return write


JSONS: dict[str, Spoil] = {
    "deep": text("[" * DEEP + "]" * DEEP),
    "deep object": text('{"a":' * DEEP + "1" + "}" * DEEP),
    "many digits": text("9" * DEEP),
    "no object": text("[]"),
    "a number": text("1"),
    "null": text("null"),
    "not a number": text("NaN"),
    "nothing in it": text("{}"),
    "lone surrogate": text('{"a": "\\ud800"}'),
}
YAMLS: dict[str, Spoil] = {
    "runs a command": text("!!python/object/apply:os.system ['touch ../ran']"),
    "runs a command within": text("trainer: !!python/object/apply:os.system ['touch ../ran']"),
    "makes an object": text("!!python/object/new:subprocess.Popen [['touch', '../ran']]"),
    "names a function": text("model: !!python/name:os.system"),
    "a module": text("!!python/module:antigravity"),
    "many digits": text("seed_everything: " + "9" * DEEP),
    "no such day": text("seed_everything: 2020-99-99"),
    "unknown tag": text("!unknown {a: 1}"),
    "tabs": text("trainer:\n\tlogger: false"),
    "two documents": text("a: 1\n---\nb: 2"),
    "keys of lists": text("? [a, b]\n: 1"),
    "a word": text("word"),
    "a list": text("[1, 2]"),
    "infinite": text("seed_everything: .inf"),
    "null byte": text("trainer: \0"),
}


# Values within JSON and YAML


def paths(contents: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the values of a document lie."""
    items = (
        contents.items() if isinstance(contents, dict) else enumerate(contents) if isinstance(contents, list) else ()
    )
    for key, value in items:
        yield (*path, key)
        yield from paths(value, (*path, key))


def put(contents: Any, path: tuple[Any, ...], value: Any) -> None:
    """Replace a value, or take it out."""
    for key in path[:-1]:
        contents = contents[key]
    contents[path[-1]] = value


def replaced(path: Path, where: tuple[Any, ...], value: Any) -> None:
    """Put another value into a JSON or YAML file."""
    contents = json.loads(path.read_text()) if path.suffix == ".json" else yaml.safe_load(path.read_text())
    put(contents, where, value)
    path.write_text(json.dumps(contents) if path.suffix == ".json" else yaml.safe_dump(contents))


# Shard sets, whose authors seal what they have made


def resealed(folder: Path) -> None:
    """Make manifest and indices agree with what is there, as the author of a hostile set would."""
    manifest = json.loads((folder / MANIFEST).read_text())
    for shard in manifest["shards"] if isinstance(manifest.get("shards"), list) else []:
        try:
            path = folder / shard["name"]
            shard |= {"index_sha256": _sha256(index_path(path)), "sha256": _sha256(path), "bytes": path.stat().st_size}
        except (OSError, TypeError, ValueError):
            continue
    reseal_manifest(folder, manifest)


def reseal_manifest(folder: Path, manifest: Any) -> None:
    contents = {name: value for name, value in manifest.items() if name != "manifest_sha256"}
    seal = hashlib.sha256(to_json(contents)).hexdigest()
    (folder / MANIFEST).write_bytes(to_json({**contents, "manifest_sha256": seal}))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def shard_named(name: str) -> Spoil:
    """The same tar and index under a name that reaches elsewhere."""

    def spoil(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest["shards"][0]["name"] = name
        reseal_manifest(folder, manifest)

    return spoil


def manifest_with(*where: Any, value: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        put(manifest, where, value)
        reseal_manifest(folder, manifest)

    return spoil


def index_with(*where: Any, value: Any) -> Spoil:
    """Another value in the index of the first shard, whose digest the manifest has."""

    def spoil(folder: Path) -> None:
        path = index_path(next(iter(sorted(folder.glob("*.tar")))))
        index = json.loads(path.read_text())
        put(index, where, value)
        path.write_text(json.dumps(index))
        resealed(folder)

    return spoil


def raw_index(contents: str) -> Spoil:
    def spoil(folder: Path) -> None:
        index_path(next(iter(sorted(folder.glob("*.tar"))))).write_text(contents)
        resealed(folder)

    return spoil


def member_with(suffix: str, data: bytes) -> Spoil:
    """Another member in every sample of the first shard; checksums, index and manifest agree."""

    def spoil(folder: Path) -> None:
        path = next(iter(sorted(folder.glob("*.tar"))))
        index = json.loads(index_path(path).read_text())
        old, new = path.read_bytes(), io.BytesIO()
        for entry in index["entries"]:
            for name, member in entry["members"].items():
                start = member["offset"] + tarfile.BLOCKSIZE
                content = data if name == suffix else old[start : start + member["size"]]
                info = tarfile.TarInfo(f"{entry['key']}.{name}")
                info.size = len(content)
                block = info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % tarfile.BLOCKSIZE)
                member |= {"offset": new.tell(), "size": len(content), "crc32": zlib.crc32(block)}
                new.write(block)
        path.write_bytes(new.getvalue() + bytes(2 * tarfile.BLOCKSIZE))
        index |= {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        index_path(path).write_text(json.dumps(index))
        resealed(folder)

    return spoil


def tar_header(**fields: Any) -> Spoil:
    """Other values in the header of the first member, to whoever reads the tar as one."""

    def spoil(folder: Path) -> None:
        path = next(iter(sorted(folder.glob("*.tar"))))
        data = path.read_bytes()
        info = tarfile.TarInfo.frombuf(data[: tarfile.BLOCKSIZE], "utf-8", "strict")
        for name, value in fields.items():
            setattr(info, name, value)
        path.write_bytes(info.tobuf(tarfile.GNU_FORMAT)[: tarfile.BLOCKSIZE] + data[tarfile.BLOCKSIZE :])

    return spoil


def npy(dtype: str, shape: str, data: bytes = b"", order: bool = False) -> bytes:
    """An array whose header says what it likes."""
    header = f"{{'descr': {dtype}, 'fortran_order': {order}, 'shape': {shape}, }}"
    header += " " * (-(len(header) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + data


def pickled_npy() -> bytes:
    return npy("'|O'", "(1,)", pickle.dumps(Runs()))


def _repeated_shard(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["shards"] *= DEEP
    reseal_manifest(folder, manifest)


NAMES = ("../../outside.tar", "/etc/passwd", "a\0b.tar", "a\nb.tar", "", ".", "..", "a/../b.tar", "x" * 5000, "a.tar/")
SHARDS: dict[str, Spoil] = {
    **{f"named {name!r}"[:40]: shard_named(name) for name in NAMES},
    "10^15 samples": manifest_with("shards", 0, "samples", value=10**15),
    "-1 samples": manifest_with("shards", 0, "samples", value=-1),
    "10^15 samples in all": manifest_with("samples", value=10**15),
    "huge maps": manifest_with("provenance", "feature_shape", value=[10**9, 10**9, 10**9]),
    "no maps": manifest_with("provenance", "feature_shape", value=[]),
    "negative maps": manifest_with("provenance", "feature_shape", value=[-1, 4, 4]),
    "huge pictures": manifest_with("provenance", "image_size", value=10**9),
    "no classes": manifest_with("provenance", "num_classes", value=-1),
    "no shards": manifest_with("shards", value=[]),
    "one shard 100,000 times": _repeated_shard,
    "another storage": manifest_with("settings", "storage", value="int8"),
    "offset of 2^60": index_with("entries", 0, "members", "json", "offset", value=2**60),
    "offset of 2^70": index_with("entries", 0, "members", "json", "offset", value=2**70),
    "offset of -512": index_with("entries", 0, "members", "json", "offset", value=-512),
    "size of 2^60": index_with("entries", 0, "members", "features.npy", "size", value=2**60),
    "size of 2^34": index_with("entries", 0, "members", "features.npy", "size", value=2**34),
    "size of -2^34": index_with("entries", 0, "members", "features.npy", "size", value=-(2**34)),
    "no members": index_with("entries", 0, "members", value={}),
    "no entries": index_with("entries", value=[]),
    "key of a path": index_with("entries", 0, "key", value="../../outside"),
    "index: no list": index_with("entries", value="entries"),
    "index: deep": raw_index("[" * DEEP + "]" * DEEP),
    "index: a number": raw_index("1"),
    "index: many digits": raw_index('{"bytes": ' + "9" * DEEP + "}"),
    "meta: deep": member_with("json", b"[" * DEEP + b"]" * DEEP),
    "meta: a list": member_with("json", b"[]"),
    "meta: empty": member_with("json", b""),
    "meta: label of 10^30": member_with("json", b'{"label": 1' + b"0" * 30 + b', "source": "s", "key": "k"}'),
    "meta: label of 5,000 digits": member_with("json", b'{"label": ' + b"1" * 5000 + b', "source": "s", "key": "k"}'),
    "meta: infinite label": member_with("json", b'{"label": Infinity, "source": "s", "key": "k"}'),
    "meta: no label": member_with("json", b'{"source": "s", "key": "k"}'),
    "array: pickled": member_with("features.npy", pickled_npy()),
    "array: 10^12 values": member_with("features.npy", npy("'<f2'", "(1000000, 1000000)", bytes(64))),
    "array: 10^30 values": member_with("features.npy", npy("'<f2'", f"({10**30},)", bytes(64))),
    "array: negative shape": member_with("features.npy", npy("'<f2'", "(-8, 4, 4)", bytes(256))),
    "array: other shape": member_with("features.npy", npy("'<f2'", "(4, 8, 4)", bytes(256))),
    "array: single precision": member_with("features.npy", npy("'<f4'", "(8, 4, 4)", bytes(512))),
    "array: big endian": member_with("features.npy", npy("'>f2'", "(8, 4, 4)", bytes(256))),
    "array: in Fortran's order": member_with("features.npy", npy("'<f2'", "(8, 4, 4)", bytes(256), order=True)),
    "array: NaN": member_with("features.npy", npy("'<f2'", "(8, 4, 4)", b"\x00\x7e" * 128)),
    "array: infinite logits": member_with("logits.npy", npy("'<f2'", "(10,)", b"\x00\x7c" * 10)),
    "array: code for a dtype": member_with("latent.npy", npy("__import__('os').system('touch ../ran')", "(1,)")),
    "array: code for a shape": member_with("latent.npy", npy("'<f2'", "__import__('os').system('touch ../ran')")),
    "array: deep header": member_with("latent.npy", npy("[" * 9000 + "]" * 9000, "(1,)")),
    "array: empty": member_with("latent.npy", b""),
    "array: none": member_with("latent.npy", b"garbage" * 9),
    "tar: huge member": tar_header(size=2**60),
    "tar: name of a path": tar_header(name="../../outside"),
    "tar: absolute name": tar_header(name="/etc/passwd"),
    "tar: link": tar_header(type=tarfile.SYMTYPE, linkname="/etc/passwd"),
}  # fmt: skip


# Pictures


def png_bomb(width: int, height: int) -> bytes:
    """A black picture of a few kilobytes, whatever its size."""
    packer, rows = zlib.compressobj(9), bytes(width // 8 + 2)
    data = b"".join(packer.compress(rows) for _ in range(min(height, 2000))) + packer.flush()
    return png_chunks((b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)), (b"IDAT", data), (b"IEND", b""))


def png_chunks(*chunks: tuple[bytes, bytes]) -> bytes:
    packed = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


IHDR = (b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
EPS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(%pipe%touch ../ran) (w) file\nshowpage\n%%EOF\n"
)
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'


def _jpeg(size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size)).save(buffer, "JPEG")
    return buffer.getvalue()


def _jpeg_of(width: int, height: int) -> bytes:
    """A picture whose header claims another size."""
    data = bytearray(_jpeg())
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def _animation(frames: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("P", (1, 1)).save(buffer, "GIF", save_all=True, append_images=[Image.new("P", (1, 1), 1)] * frames)
    return buffer.getvalue()


PICTURES: dict[str, bytes] = {
    "50,000 x 50,000 pixels": png_bomb(50_000, 50_000),
    "13,000 x 13,000 pixels": png_bomb(13_000, 13_000),
    "a line of 2^31 - 1 pixels": png_bomb(2**31 - 1, 1)[:200],
    "JPEG of 65,500 x 65,500": _jpeg_of(65_500, 65_500),
    "JPEG of 0 x 0": _jpeg_of(0, 0),
    "PNG of 0 x 0": png_chunks((b"IHDR", bytes(8) + b"\x08\x02\0\0\0"), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")),
    "PNG without data": png_chunks(IHDR, (b"IEND", b"")),
    "PNG without end": png_chunks(IHDR, (b"IDAT", zlib.compress(bytes(200)))),
    "PNG whose text unpacks to 1 GB": png_chunks(
        IHDR, (b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 26))), (b"IDAT", zlib.compress(bytes(200))), (b"IEND", b"")
    ),
    "PNG chunk of 2^31 bytes": b"\x89PNG\r\n\x1a\n" + b"\x7f\xff\xff\xffIHDR",
    "PostScript": EPS,
    "SVG": SVG,
    "half a JPEG": _jpeg(64)[:300],
    "JPEG header alone": b"\xff\xd8\xff\xe0",
    "GIF of a thousand frames": _animation(1000),
    "TIFF that points to itself": b"II*\0\x08\0\0\0" + b"\x01\0\0\x01\x04\0\x01\0\0\0\x01\0\0\0" + b"\x08\0\0\0",
    "BMP of -2^31 rows": b"BM" + bytes(12) + struct.pack("<IiiHHIIiiII", 40, 8, -(2**31), 1, 24, 0, 0, 0, 0, 0, 0),
    "WebP without data": b"RIFF\xff\xff\xff\x7fWEBPVP8 ",
    "pickle": pickle.dumps(Runs()),
    "nothing": b"",
}


def content(data: bytes) -> Spoil:
    def write(path: Path) -> None:
        path.write_bytes(data)

    return write


# Files of torch


def torch_file(contents: Any, **options: Any) -> Spoil:
    def write(path: Path) -> None:
        torch.save(contents, path, **options)

    return write


def changed_checkpoint(change: Callable[[dict[str, Any]], Any]) -> Spoil:
    """What is loaded, changed and saved again: whole by all its checksums."""

    def write(path: Path) -> None:
        checkpoint = torch.load(path, weights_only=True)
        torch.save(change(checkpoint), path)

    return write


def with_weight(change: Callable[[torch.Tensor], Any]) -> Spoil:
    """Another tensor in place of the first of the weights."""

    def one(checkpoint: dict[str, Any]) -> dict[str, Any]:
        name = next(iter(checkpoint["state_dict"]))
        return {**checkpoint, "state_dict": {**checkpoint["state_dict"], name: change(checkpoint["state_dict"][name])}}

    return changed_checkpoint(one)


def zip_bomb(path: Path) -> None:
    """4 GB of zeros, packed to 4 MB, as the values of one tensor."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, data in entries.items():
            if name.endswith("data/0"):
                with archive.open(name, "w", force_zip64=True) as file:
                    for _ in range(1 << 8):
                        file.write(bytes(1 << 24))
            else:
                archive.writestr(name, data)


def zip_with_paths(path: Path) -> None:
    """Entries that would lie elsewhere if anyone unpacked them."""
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../../outside", "x")
        archive.writestr("/tmp/featinv-outside", "x")


def huge_storage(path: Path) -> None:
    """A pickle that says its storage has 2^40 values."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            if name.endswith("data.pkl"):  # numbers of elements are the only two-byte integers of a pickle
                place = data.index(b"M")
                data = data[:place] + b"\x8a\x06" + (2**40).to_bytes(6, "little") + data[place + 3 :]
            archive.writestr(name, data)


def _nested() -> Any:
    contents: Any = []
    for _ in range(400):
        contents = [contents]
    return contents


CHECKPOINTS: dict[str, Spoil] = {
    "pickle in a zip": torch_file({"state_dict": {"a": Runs()}}),
    "pickle of before": torch_file({"state_dict": {"a": Runs()}}, _use_new_zipfile_serialization=False),
    "pickle beside weights": changed_checkpoint(lambda contents: {**contents, "extra": Runs()}),
    "zip bomb": zip_bomb,
    "zip of paths": zip_with_paths,
    "storage of 2^40 values": huge_storage,
    "tensor of 10^12 values in 4 bytes": with_weight(lambda one: torch.zeros(1).expand(10**6, 10**6)),
    "tensor of another shape": with_weight(lambda one: torch.zeros(3, 3)),
    "tensor of integers": with_weight(lambda one: one.to(torch.int64)),
    "tensor of complex numbers": with_weight(lambda one: one.to(torch.complex64)),
    "sparse tensor": with_weight(lambda one: one.to_sparse()),
    "quantised tensor": with_weight(lambda one: torch.quantize_per_tensor(one, 0.1, 0, torch.qint8)),
    "tensor on meta": with_weight(lambda one: one.to("meta")),
    "tensor of NaN": with_weight(lambda one: torch.full_like(one, torch.nan)),
    "tensor of infinities": with_weight(lambda one: torch.full_like(one, torch.inf)),
    "a word for a tensor": with_weight(lambda one: "word"),
    "a list": changed_checkpoint(lambda contents: [contents]),
    "a tensor alone": changed_checkpoint(lambda contents: torch.zeros(3)),
    "nothing in it": changed_checkpoint(lambda contents: {}),
    "no weights": changed_checkpoint(lambda contents: {**contents, "state_dict": {}}),
    "weights that are none": changed_checkpoint(lambda contents: {**contents, "state_dict": [1]}),
    "names that are none": changed_checkpoint(lambda contents: {**contents, "state_dict": {1: torch.zeros(1)}}),
    "no state": changed_checkpoint(lambda contents: {n: value for n, value in contents.items() if n != "state_dict"}),
    "no step": changed_checkpoint(lambda contents: {n: value for n, value in contents.items() if n != "global_step"}),
    "steps of markup": changed_checkpoint(lambda contents: {**contents, "global_step": "{{ 7 * 7 }}<script>"}),
    "identity of a list": changed_checkpoint(lambda contents: {**contents, "inversion": [1]}),
    "deep": changed_checkpoint(lambda contents: {**contents, "deep": _nested()}),
}


# Safetensors


def safetensors_header(header: bytes, length: int | None = None, data: bytes = b"") -> Spoil:
    return content(struct.pack("<Q", len(header) if length is None else length) + header + data)


def changed_tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Spoil:
    def write(path: Path) -> None:
        save_file({name: one.contiguous() for name, one in change(load_file(path)).items()}, path)

    return write


def each(change: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    return changed_tensors(
        lambda tensors: {name: change(one) if one.is_floating_point() else one for name, one in tensors.items()}
    )


TENSORS: dict[str, Spoil] = {
    "header of 2^60 bytes": safetensors_header(b"{}", 2**60),
    "header of 2^63 bytes": safetensors_header(b"{}", 2**63),
    "header of nothing": safetensors_header(b"", 0),
    "header: deep": safetensors_header(b'{"a":' * DEEP),
    "header: 10^18 values": safetensors_header(
        b'{"a":{"dtype":"F32","shape":[1000000000,1000000000],"data_offsets":[0,4000000000000000000]}}'
    ),
    "header: overlapping": safetensors_header(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}',
        data=bytes(12),
    ),
    "header: unknown dtype": safetensors_header(b'{"a":{"dtype":"X9","shape":[1],"data_offsets":[0,1]}}', data=b"1"),
    "header: negative": safetensors_header(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[4,0]}}', data=bytes(4)),
    "a tensor missing": changed_tensors(lambda tensors: dict(list(tensors.items())[1:])),
    "a tensor more": changed_tensors(lambda tensors: {**tensors, "../../outside": torch.zeros(1)}),
    "other shapes": each(lambda one: one[None]),
    "integers": each(lambda one: one.long()),
    "NaN": each(lambda one: torch.full_like(one, torch.nan)),
    "infinities": each(lambda one: torch.full_like(one, torch.inf)),
    "eight bits": each(lambda one: one.to(torch.float8_e4m3fn)),
    "flags": each(lambda one: one.bool()),
}


# Folders of models


def in_part(part: str, name: str, spoil: Spoil) -> Spoil:
    """Spoil one file of a model folder, and let its author write the checksums anew."""

    def write(folder: Path) -> None:
        spoil(folder / part / name)
        signed(folder)

    return write


def signed(folder: Path) -> None:
    """Checksums that agree with what is there."""
    (folder / SUMS).unlink(missing_ok=True)
    if all(path.is_file() and path.stat().st_size < 1 << 30 for path in folder.rglob("*") if not path.is_dir()):
        write_sums(folder)


def weights_elsewhere(folder: Path) -> None:
    """An index of the parts of large weights that names a file outside."""
    unet = folder / "prior" / "unet"
    weights = unet / "diffusion_pytorch_model.safetensors"
    names = list(load_file(weights))
    shutil.move(weights, folder.parents[1] / "outside.safetensors")
    target = "../../../../../outside.safetensors"
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, target)}
    (unet / f"{weights.name}.index.json").write_text(json.dumps(index))
    signed(folder)


def pickled_weights(part: str) -> Spoil:
    """A pickle alone, as in old folders."""

    def write(folder: Path) -> None:
        for path in (folder / part).glob("*.safetensors"):
            path.unlink()
        name = "pytorch_model.bin" if part == "backbone" else "diffusion_pytorch_model.bin"
        torch.save({"conv_in.weight": Runs()}, folder / part / name)
        signed(folder)

    return write


def field(part: str, name: str, *where: Any, value: Any) -> Spoil:
    return in_part(part, name, lambda path: replaced(path, where, value))


INDEX, CONFIG, SCHEDULE = "model_index.json", "config.json", "scheduler_config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
MODELS: dict[str, Spoil] = {
    **{f"index: {name}": in_part(".", INDEX, spoil) for name, spoil in JSONS.items()},
    **{f"configuration: {name}": in_part("prior/unet", CONFIG, spoil) for name, spoil in JSONS.items()},
    **{f"classifier: {name}": in_part("backbone", CONFIG, spoil) for name, spoil in JSONS.items()},
    **{f"schedule: {name}": in_part("prior/scheduler", SCHEDULE, spoil) for name, spoil in JSONS.items()},
    **{f"control: {name}": in_part("controlnet", WEIGHTS, spoil) for name, spoil in TENSORS.items()},
    **{f"UNet: {name}": in_part("prior/unet", WEIGHTS, spoil) for name, spoil in TENSORS.items()},
    **{f"classifier: {name}": in_part("backbone", "model.safetensors", spoil) for name, spoil in TENSORS.items()},
    **{f"prompts: {name}": in_part("prior", "prompts.safetensors", spoil) for name, spoil in TENSORS.items()},
    "pickle for the UNet": pickled_weights("prior/unet"),
    "pickle for the autoencoder": pickled_weights("prior/vae"),
    "pickle for the classifier": pickled_weights("backbone"),
    "weights outside": weights_elsewhere,
    "images of 10^9 pixels": field(".", INDEX, "image_size", value=10**9),
    "images of 10^5 pixels": field(".", INDEX, "image_size", value=10**5),
    "images of 1.5 pixels": field(".", INDEX, "image_size", value=1.5),
    "10^6 layers": field(".", INDEX, "num_layers", value=10**6),
    "10^6 channels": field(".", INDEX, "hidden_channels", value=10**6),
    "-1 channels": field(".", INDEX, "hidden_channels", value=-1),
    "10^12 steps": field(".", INDEX, "sampler", "steps", value=10**12),
    "scale of NaN": field(".", INDEX, "sampler", "guidance_scale", value=float("nan")),
    "scale of a word": field(".", INDEX, "sampler", "guidance_scale", value="word"),
    "unknown sampler": field(".", INDEX, "sampler", "scheduler", value="__class__"),
    "unknown field": field(".", INDEX, "sampler", "__class__", value="x"),
    "layer of a method": field(".", INDEX, "layer", value="__init__"),
    "pictures of 10^6 pixels": field(".", INDEX, "input_size", value=10**6),
    "prior of a command": field(".", INDEX, "prior", value="$(touch ../ran)"),
    "UNet of 10^6 channels": field("prior/unet", CONFIG, "block_out_channels", value=[10**6, 10**6]),
    "UNet of 10^12 channels": field("prior/unet", CONFIG, "block_out_channels", value=[10**12, 10**12]),
    "UNet of 10^9 layers": field("prior/unet", CONFIG, "layers_per_block", value=10**9),
    "UNet of another class": field("prior/unet", CONFIG, "_class_name", value="os.system"),
    "UNet of another kind": field("prior/unet", CONFIG, "down_block_types", value=["__import__", "x"]),
    "UNet without a kind": field("prior/unet", CONFIG, "down_block_types", value=None),
    "autoencoder of 10^6 channels": field("prior/vae", CONFIG, "block_out_channels", value=[10**6] * 4),
    "classifier of 10^6 channels": field("backbone", CONFIG, "model_args", "channels", value=[10**6] * 4),
    "classifier of a path": field("backbone", CONFIG, "architecture", value="../../outside"),
    "classifier for huge pictures": field("backbone", CONFIG, "pretrained_cfg", "input_size", value=[3, 10**6, 10**6]),
    "classifier for no pictures": field("backbone", CONFIG, "pretrained_cfg", "input_size", value=[3, 0, 0]),
    "classifier from elsewhere": field("backbone", CONFIG, "pretrained_cfg", "url", value="http://127.0.0.1:9/x.pth"),
    "classifier of a file": field("backbone", CONFIG, "pretrained_cfg", "file", value="../../outside"),
    "deviation of zero": field("backbone", CONFIG, "pretrained_cfg", "std", value=[0, 0, 0]),
    "10^10 time steps": field("prior/scheduler", SCHEDULE, "num_train_timesteps", value=10**10),
    "10^30 time steps": field("prior/scheduler", SCHEDULE, "num_train_timesteps", value=10**30),
    "no time steps": field("prior/scheduler", SCHEDULE, "num_train_timesteps", value=0),
    "noise of NaN": field("prior/scheduler", SCHEDULE, "beta_end", value=float("nan")),
    "noise of a word": field("prior/scheduler", SCHEDULE, "beta_schedule", value="__class__"),
}  # fmt: skip


# Concepts


def concepts_with(spoil: Spoil) -> Spoil:
    """Other tensors, with the digest that belongs to them."""

    def write(folder: Path) -> None:
        from featinv_pl.explore.concepts import FACTS, TENSORS, seal

        spoil(folder / TENSORS)
        facts = json.loads((folder / FACTS).read_text())
        facts["sha256"] = seal((folder / TENSORS).read_bytes(), facts)
        (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n")

    return write


def fact(*where: Any, value: Any) -> Spoil:
    def write(folder: Path) -> None:
        from featinv_pl.explore.concepts import FACTS

        replaced(folder / FACTS, where, value)
        concepts_with(lambda path: None)(folder)

    return write


def single(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    return concepts_with(changed_tensors(lambda tensors: {**tensors, name: change(tensors[name])}))


CONCEPTS: dict[str, Spoil] = {
    **{f"tensors: {name}": concepts_with(spoil) for name, spoil in TENSORS.items()},
    **{f"facts: {name}": within("concepts.json", spoil) for name, spoil in JSONS.items()},
    "directions of other channels": single("directions", lambda one: one.repeat(1, 2, 1, 1)),
    "directions of another grid": single("directions", lambda one: torch.ones(*one.shape[:2], 3, 3)),
    "10^7 locations": single("directions", lambda one: torch.ones(*one.shape[:2], 1000, 1000)),
    "no directions": single("directions", lambda one: one[:0]),
    "directions of zero": single("directions", torch.zeros_like),
    "starts of another shape": single("starts", lambda one: one[:, :1]),
    "a name of a path": fact("names", 0, value="../../outside"),
    "a name of markup": fact("names", 0, value="<script>alert(1)</script>"),
    "more names than directions": fact("names", value=["a", "b", "c"]),
    "no names": fact("names", value=[]),
    "another method": fact("method", value="nmf"),
    "an unknown method": fact("method", value="__class__"),
    "another layer": fact("origin", "layer", value="stages.0"),
    "other maps": fact("origin", "feature_shape", value=[10**9, 10**9, 10**9]),
}  # fmt: skip


# Scored runs


def scored(name: str, spoil: Spoil) -> Spoil:
    def write(folder: Path) -> None:
        spoil(folder / "spatial" / name)

    return write


def document(*where: Any, value: Any) -> Spoil:
    return scored("metrics.json", lambda path: replaced(path, where, value))


def _link_in_place_of_output(name: str) -> Spoil:
    """Where a report would be written, a link to a file of the user's."""

    def write(folder: Path) -> None:
        (folder / name).symlink_to("../../outside")

    return write


TILES = "pictures/clean/first/tiles.json"
COSINE = ("scores", "clean", "inversion", "cosine")
STRIP = "pictures/clean/first/original.png"
REPORTS: dict[str, Spoil] = {
    **{f"scores: {name}": scored("metrics.json", spoil) for name, spoil in JSONS.items()},
    **{f"tiles: {name}": scored(TILES, spoil) for name, spoil in JSONS.items()},
    **{f"tiles: {spoil.__name__}": scored(TILES, spoil) for spoil in ANY},
    **{f"picture: {spoil.__name__}": scored(STRIP, spoil) for spoil in ANY},
    **{f"picture: {name}": scored(STRIP, content(data)) for name, data in PICTURES.items()},
    **{f"samples: {spoil.__name__}": scored("samples/clean.parquet", spoil) for spoil in ANY},
    **{f"stages: {name}": within("stages.json", spoil) for name, spoil in JSONS.items()},
    "score of NaN": document(*COSINE, "value", value=float("nan")),
    "score of a word": document(*COSINE, "value", value="word"),
    "score of 400 digits": document(*COSINE, "value", value=10**400),
    "half an interval": document(*COSINE, value={"value": 0.5, "low": 0.4}),
    "no interval": document(*COSINE, value={"value": 0.5}),
    "scores of an earlier version": document("scores", value={"clean/cosine": 0.5}),
    "source of a path": document("samples", value={"../../outside": 1}),
    "samples of a word": document("samples", "clean", value="word"),
    "notes of markup": document("notes", value=["<script>alert(1)</script>"]),
    "notes of numbers": document("notes", value=[1]),
    "severity of 10^12": document("samples", f"a/b/{10**12}", value=1),
    "report is a link": _link_in_place_of_output("report.html"),
    "half a report is a link": _link_in_place_of_output("report.html.partial"),
}  # fmt: skip
