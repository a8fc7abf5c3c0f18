"""Pictures of every kind, by values known beforehand."""

import io
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from featinv_pl.data.images.sources import FolderImages
from featinv_pl.decoding import LARGEST_ASPECT, NoImageError, open_image, to_rgb
from featinv_pl.inverter.pipeline import FeatInvPipeline
from featinv_pl.types import to_uint8

GREY16 = (np.arange(64 * 64, dtype=np.uint16) * 16 + 7).reshape(64, 64)


def decoded(image: Image.Image, file: str, **options: Any) -> NDArray[np.uint8]:
    image.save(file, **options)
    opened = open_image(Path(file))
    assert opened.mode == "RGB"
    return np.asarray(opened)


@pytest.mark.parametrize("file", ["a.png", "a.tif", "a.pgm"])
def test_16_bits_are_scaled_to_8(file: str) -> None:
    expected = np.floor(GREY16 / 65535 * 255 + 0.5)
    assert np.array_equal(decoded(Image.fromarray(GREY16), file), np.repeat(expected[..., None], 3, 2))
    if file == "a.png":
        assert decoded(Image.fromarray(np.full((8, 8), 300, np.uint16)), file, transparency=300).min() == 255


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_composited_on_white(mode: str) -> None:
    colours, alpha = np.zeros((16, 16), np.uint8), np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.merge(mode, [Image.fromarray(colours)] * (len(mode) - 1) + [Image.fromarray(alpha)])
    expected = 255 - alpha.astype(float)  # black of that opacity
    assert np.abs(decoded(image, "a.png") - expected[..., None]).max() <= 1


def test_palettes_and_single_transparent_colours() -> None:
    palette = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), "P")
    palette.putpalette([9, 8, 7, 0, 0, 0, 200, 100, 50])
    for file in ("a.png", "a.gif"):
        seen = decoded(palette, file, transparency=1)
        assert seen.tolist() == [[[9, 8, 7], [255] * 3], [[200, 100, 50], [255] * 3]]
    colours = Image.new("RGB", (4, 4), (1, 2, 3))
    assert decoded(colours, "a.png", transparency=(1, 2, 3)).min() == 255
    assert decoded(colours, "a.png")[0, 0].tolist() == [1, 2, 3]
    assert decoded(Image.new("CMYK", (4, 4), (255, 0, 0, 0)), "a.tif")[0, 0].tolist() == [0, 255, 255]
    assert decoded(Image.new("1", (4, 4), 1), "a.pbm").min() == 255


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, 3), (8, 1)])
@pytest.mark.parametrize(("file", "mode"), [("a.png", "RGB"), ("a.png", "I;16"), ("a.png", "RGBA"), ("a.tif", "L")])
def test_orientation_is_applied(file: str, mode: str, orientation: int, turns: int) -> None:
    corner = np.zeros((6, 4), np.uint8)
    corner[0, 0] = 255
    image = Image.fromarray(corner.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(corner).convert(mode)
    exif = Image.Exif()
    exif[274] = orientation
    assert np.array_equal(decoded(image, file, exif=exif)[..., 0], np.rot90(corner, turns))


@pytest.mark.parametrize(
    ("values", "file", "reason"),
    [
        (np.ones((4, 4), np.float32), "a.tif", "floating-point"),
        (np.ones((4, 4), np.int32), "a.tif", "neither 8 nor 16 bits"),
        (np.ones((1, LARGEST_ASPECT + 1), np.uint8), "a.png", "101 x 1 pixels"),
    ],
)
def test_refuses_values_without_a_white_and_narrow_pictures(values: NDArray[Any], file: str, reason: str) -> None:
    image = Image.fromarray(values)
    image.save(file)
    with pytest.raises(NoImageError, match=reason):
        open_image(Path(file))
    with pytest.raises(NoImageError, match=reason):
        to_rgb(image)
    to_rgb(Image.new("L", (LARGEST_ASPECT, 1)))


def test_a_long_picture_is_a_bad_image_of_little_memory() -> None:
    """8.8 kB that a resize of the shorter side would blow up to hundreds of gigabytes."""
    Path("a").mkdir()
    Image.new("RGB", (3_000_000, 1)).save("a/long.png")
    tracemalloc.start()
    sample = FolderImages(Path(), "s", 256, tolerant=True)[0]
    assert "3000000 x 1 pixels" in sample.unreadable
    assert tracemalloc.get_traced_memory()[1] < 1e7
    tracemalloc.stop()


def test_data_sets_and_the_pipeline_see_the_same(pipeline: FeatInvPipeline) -> None:
    rgba = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 4), np.uint8))
    exif = Image.Exif()
    exif[274] = 6
    buffer = io.BytesIO()
    rgba.save(buffer, "PNG", exif=exif)
    Path("a").mkdir()
    Path("a/x.png").write_bytes(buffer.getvalue())
    seen = FolderImages(Path(), "s", 32)[0].images
    assert np.array_equal(seen, to_uint8(pipeline.crop([Image.open(buffer)])[0]))
    assert np.array_equal(seen.permute(1, 2, 0), np.asarray(open_image(Path("a/x.png"))))
