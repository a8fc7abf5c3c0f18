"""Random views of an image: crop and flips, each a function of seed, key and number alone."""

import hashlib

import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from featinv_pl.types import View

SCALE, RATIO = [0.08, 1.0], [3 / 4, 4 / 3]  # torchvision's own, which the paper's authors use


def random_view(image: Image.Image, key: str, number: int, seed: int, vertical_flip: bool) -> View:
    """Sample a random resized crop and flips.

    Args:
        image: The original.
        key: Its name.
        number: Which of its views.
        seed: Seed of all views.
        vertical_flip: Flip upside down too, in half of the views.
    """
    # Of the key alone, so that a view does not depend on the process that makes it.
    own_seed = int.from_bytes(hashlib.sha256(f"{seed}/{number}/{key}".encode()).digest()[:8], "little", signed=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(own_seed)
        top, left, height, width = RandomResizedCrop.get_params(image, SCALE, RATIO)
        horizontal, vertical = (torch.rand(2) < 0.5).tolist()
    flips = "h" * horizontal + "v" * (vertical and vertical_flip)
    return {"number": number, "crop": (top, left, height, width), "flips": flips}


def take_view(image: Image.Image, view: View, size: int) -> Image.Image:
    """Cut a view out of the original, as a square of the given size."""
    top, left, height, width = view["crop"]
    image = transforms.resized_crop(image, top, left, height, width, [size, size], InterpolationMode.BICUBIC)
    if "h" in view["flips"]:
        image = transforms.horizontal_flip(image)
    if "v" in view["flips"]:
        image = transforms.vertical_flip(image)
    return image
