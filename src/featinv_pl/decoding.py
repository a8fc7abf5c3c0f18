"""Pictures decoded to RGB bytes, in one way everywhere: data sets, commands, the pipeline and the app."""

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import TiffImageFile

# Of all that Pillow reads, what is a picture: PostScript, for one, is a program, which it would let Ghostscript run.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"}
)
MOST_PIXELS = 100_000_000  # of which a file of a few kilobytes can have any number
LARGEST_ASPECT = 100  # resizing the shorter side would make as many times the memory of the crop
SIXTEEN_BITS = (np.arange(1 << 16) * 255 / 65535).round().astype(np.uint8)
WHITE = np.uint8(255)
ADDRESS = re.compile(r" <_io\.BytesIO object at 0x\w+>")  # which would be another in each run
BITS, PHOTOMETRIC = 258, 262  # tags of a TIFF


class NoImageError(Exception):
    """A file or picture cannot be read as an image."""


def open_image(given: Path | bytes) -> Image.Image:
    """Decode an image file, or its bytes, completely; see `to_rgb`.

    Raises:
        NoImageError: The file is damaged, of another format, or not a photograph by its size or values.
    """
    try:
        if isinstance(given, Path) and not given.is_file():
            raise FileNotFoundError("there is no such file")
        with Image.open(given if isinstance(given, Path) else io.BytesIO(given), formats=FORMATS) as file:
            return to_rgb(file)
    except NoImageError:
        raise
    except Exception as error:  # of a damaged file, Pillow's decoders raise anything
        text = ADDRESS.sub("", str(error))
        text = text.replace(str(given), given.name) if isinstance(given, Path) else text
        raise NoImageError(text or type(error).__name__) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Bring a picture of any mode to RGB as it is meant to be seen.

    The EXIF orientation is applied, transparency is composited on white, and 16-bit grey is scaled to 8 bits.

    Raises:
        NoImageError: The picture is too large or too narrow, or its values have no defined white.
    """
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise NoImageError(f"it has {width} x {height} pixels")
    if max(width, height) > LARGEST_ASPECT * min(width, height):
        raise NoImageError(f"it has {width} x {height} pixels, and an aspect of {LARGEST_ASPECT} is the most")
    if image.mode == "F":
        raise NoImageError("its values are floating-point numbers, which define no white; save 8 or 16 bits")
    if isinstance(image, TiffImageFile):
        image.filename = ""  # or Pillow maps the file into memory, and scrambles a picture that is to be turned
    image.load()  # of a TIFF, this applies the orientation already, and takes it away
    if image.mode.startswith("I"):
        return _grey(image).convert("RGB")
    image = ImageOps.exif_transpose(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    opaque = Image.new("RGB", image.size, "white")
    opaque.paste(image, mask=image.getchannel("A"))
    return opaque


def _grey(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits, transparency being white."""
    tags: Any = getattr(image, "tag_v2", {})
    sixteen = tags.get(BITS, (16,)) == (16,) and tags.get(PHOTOMETRIC, 1) == 1
    if not sixteen or (image.mode == "I" and image.format != "PPM"):
        raise NoImageError("its integers are neither 8 nor 16 bits from black to white; save 8 or 16 bits")
    values = np.asarray(ImageOps.exif_transpose(image)).astype(np.uint16)
    return Image.fromarray(np.where(values == image.info.get("transparency", -1), WHITE, SIXTEEN_BITS[values]))
