"""Corruptions have the published strength and spectrum, repeat, and keep the format of an image."""

import io
import json
import zipfile
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, Resize

from conftest import ROOT
from featinv_pl.data.images.corruptions import CORRUPTIONS, CorruptedImages, corrupt
from featinv_pl.data.images.datamodule import CorruptedData
from featinv_pl.data.images.digits import DigitImages, DigitsData, digit_images
from featinv_pl.errors import UserError
from featinv_pl.types import key_hash

SHARED = ROOT.parent / "shared"
PUBLISHED = SHARED / "golden/corruptions.json"
SHARES = "share_of_change_above_1_16_1_8_1_4_cycles_per_pixel"
NAMES = list(CORRUPTIONS)
COMPARED = [name for name in NAMES if name not in ("motion_blur", "snow", "frost")]
CERTAIN = ["defocus_blur", "gaussian_blur", "zoom_blur", "brightness", "contrast", "saturate", "pixelate"]
CERTAIN += ["jpeg_compression"]


def applied(name: str, pixels: Any, constants: Any, seed: int = 0) -> Any:
    return CORRUPTIONS[name](pixels, constants, np.random.RandomState(seed))


def test_formulas_by_hand() -> None:
    pixels = np.array([[[0.2, 0.4, 0.6], [0.0, 0.0, 0.0]]])
    # At value 0.8 instead of 0.6, hue and saturation kept; black becomes grey.
    expected = np.array([0.2 * 0.8 / 0.6, 0.4 * 0.8 / 0.6, 0.8, 0.2, 0.2, 0.2]).reshape(2, 3)
    np.testing.assert_allclose(applied("brightness", pixels, 0.2)[0], expected)
    # Saturation 2/3, halved: the least channel moves from a third of the value to two thirds.
    np.testing.assert_allclose(applied("saturate", pixels, (0.5, 0))[0], np.array([[0.4, 0.5, 0.6], [0, 0, 0]]))
    # Half the contrast about the mean of 70.5 gives 55.25 and 85.75, whose fractions are lost.
    two = np.array([[[40] * 3, [101] * 3]], dtype=np.uint8)
    assert corrupt(two, "contrast", 2, seed=0)[0, :, 0].tolist() == [55, 85]
    point = np.zeros((31, 31, 3))
    point[15, 15] = 1
    for name, constants in {"defocus_blur": (3, 0.1), "motion_blur": (10, 3), "gaussian_blur": 1}.items():
        assert applied(name, point, constants).sum() == pytest.approx(3)
    disc = applied("defocus_blur", point, (3, 0.1))[..., 0]
    assert (disc > 1e-6).sum() == 29  # points of the grid within 3 of the centre


@pytest.mark.parametrize("name", NAMES)
def test_every_severity_changes_an_image_by_its_seed_alone(name: str) -> None:
    assert len(NAMES) == 15 + 4
    for size in ((32, 32), (72, 100)):
        image = np.asarray(Image.fromarray(digit_images()[5]).resize(size[::-1])) // 2 + 40
        image[..., 0] //= 2  # a colour, which saturation can change
        kept = image.copy()
        for severity in (1, 3, 5):
            corrupted = corrupt(image, name, severity, seed=7)
            assert corrupted.shape == (*size, 3)
            assert corrupted.dtype == np.uint8
            # CIFAR-10-C's smallest blurs reach no farther than a pixel.
            assert not np.array_equal(corrupted, image) or (name == "defocus_blur" and severity < 4)
        np.random.seed(1)
        assert np.array_equal(corrupt(image, name, 5, seed=7), corrupted)
        assert np.array_equal(corrupt(image, name, 5, seed=8), corrupted) == (name in CERTAIN)
        assert np.array_equal(image, kept)


@pytest.mark.parametrize(("side", "spread"), [(64, 0.08), (65, 0.18)])
def test_constants_follow_the_size_of_the_image(side: int, spread: float) -> None:
    grey = np.full((side, side, 3), 128, dtype=np.uint8)
    noise = (corrupt(grey, "gaussian_noise", 3, seed=0).astype(float) - grey) / 255
    assert noise.std() == pytest.approx(spread, rel=0.05)
    white = corrupt(np.full_like(grey, 255), "gaussian_noise", 1, seed=0)
    assert white.min() > 128  # values saturate and never wrap


# Against the published functions (hendrycks/robustness), which were run with the seed i for the i-th image


@cache
def published(images: str) -> tuple[dict[str, Any], list[NDArray[np.uint8]]]:
    if not PUBLISHED.is_file():
        pytest.skip(f"{PUBLISHED}, statistics of the published functions, is not on this machine")
    statistics = json.loads(PUBLISHED.read_text())[images]
    if images.startswith("cifar"):
        with zipfile.ZipFile(SHARED / "data/cifar10/cifar10-images.zip") as archive:
            files: list[Any] = [io.BytesIO(archive.read(name)) for name in statistics["images"]]
    else:
        files = [SHARED / "data/imagenet-sample" / name for name in statistics["images"]]
    crop = Compose([Resize(256), CenterCrop(224)]) if images.startswith("imagenet") else lambda image: image
    return statistics["corruptions"], [np.asarray(crop(Image.open(file).convert("RGB"))) for file in files]


def shares_above(change: NDArray[Any]) -> list[float]:
    """Of the energy of the mean over channels, without its constant part, by frequency."""
    energy = np.abs(np.fft.fft2(change.mean(2))) ** 2
    energy[0, 0] = 0
    frequency = np.hypot(np.fft.fftfreq(len(energy))[:, None], np.fft.fftfreq(energy.shape[1]))
    return [float(energy[frequency > limit].sum() / energy.sum()) for limit in (1 / 16, 1 / 8, 1 / 4)]


@pytest.mark.parametrize(("images", "severities"), [("cifar10-32px", (2, 5)), ("imagenet-224px", (4,))])
@pytest.mark.parametrize("name", COMPARED)
def test_strength_and_spectrum_are_the_published_ones(name: str, images: str, severities: Any) -> None:
    statistics, originals = published(images)
    for severity in severities:
        expected = statistics[name][str(severity)]
        changes = [corrupt(image, name, severity, seed).astype(float) - image for seed, image in enumerate(originals)]
        # scikit-image has random numbers of its own for impulses; the others are the same numbers.
        tolerance = 0.05 if name == "impulse_noise" else 0.02
        rmse = float(np.mean([np.sqrt(np.square(change).mean()) for change in changes]))
        assert rmse == pytest.approx(expected["rmse"], rel=tolerance)
        shares = np.mean([shares_above(change) for change in changes], axis=0)
        np.testing.assert_allclose(shares, expected[SHARES], rtol=tolerance)


def test_glass_overwrites_where_the_published_swap_of_views_does() -> None:
    pixels = np.random.default_rng(1).random((20, 23, 3))
    expected = np.floor(pixels * 255) / 255
    rng = np.random.RandomState(0)
    for _ in range(2):
        for row in range(20 - 2, 2, -1):
            for column in range(23 - 2, 2, -1):
                right, down = rng.randint(-2, 2, size=(2,))
                expected[row, column], expected[row + down, column + right] = (
                    expected[row + down, column + right],
                    expected[row, column],
                )
    assert np.array_equal(applied("glass_blur", pixels, (0.0, 2, 2)), expected)


def test_fog_is_rough_by_the_square_of_its_decay() -> None:
    haze = 2 * applied("fog", np.ones((256, 256, 3)), (1.0, 1.5))[..., 0] - 1
    spreads = []
    for step in (2, 4):  # at the two finest scales, a point differs from its corners' mean by the random part
        coarse = haze[::step, ::step]
        rows = coarse + np.roll(coarse, -1, axis=0)
        corners = (rows + np.roll(rows, -1, axis=1)) / 4
        spreads.append((haze[step // 2 :: step, step // 2 :: step] - corners).std())
    assert spreads[0] / spreads[1] == pytest.approx(1.5**-2, rel=0.05)


def test_small_images_zoom_off_centre() -> None:
    ramp = np.linspace(0, 1, 32)
    magnified = [ramp, ramp]  # itself, and magnified by 1
    for first, rows in ((2, 27), (4, 23)):  # by 1.2 and 1.4, so many rows become 32
        magnified.append(np.interp(np.linspace(first, first + rows - 1, 32), np.arange(32), ramp))
    pixels = np.broadcast_to(ramp[:, None, None], (32, 32, 3))
    zoomed = applied("zoom_blur", pixels, (1.5, 0.2))
    np.testing.assert_allclose(zoomed[:, 16, 0], np.mean(magnified, axis=0))


def test_water_shines_in_drops_alone() -> None:
    pixels = np.full((64, 64, 3), 0.2)
    added = applied("spatter", pixels, (0.65, 0.3, 2, 0.69, 0.5, 0)) - pixels
    assert added.min() == 0
    np.testing.assert_allclose(added.max((0, 1)), 0.5 * np.array([175, 238, 238]) / 255)
    assert 0.5 < (added == 0).all(2).mean() < 0.9


# Any images


def test_images_are_corrupted_by_their_keys() -> None:
    images = DigitImages("clean")
    corrupted = CorruptedImages(images, "shot_noise", 4)
    assert (corrupted.source, len(corrupted)) == ("clean-corrupted/shot_noise/4", len(images))
    sample, original = corrupted[3], images[3]
    assert sample[1:] == (*original[1:3], corrupted.source, *original[4:])
    pixels = original.images.permute(1, 2, 0).numpy()
    expected = corrupt(pixels, "shot_noise", 4, seed=key_hash(original.key))
    np.testing.assert_array_equal(sample.images.permute(1, 2, 0).numpy(), expected)


def test_every_corruption_of_every_source() -> None:
    data = CorruptedData(DigitsData(["clean", "hard"], batch_size=7), ["fog", "contrast"], [1, 5])
    loaders: Any = data.predict_dataloader()
    names = [f"{name}/{severity}" for name in ("fog", "contrast") for severity in (1, 5)]
    expected = [f"{source}-corrupted/{name}" for source in ("clean", "hard") for name in names]
    assert [loader.dataset.images.source for loader in loaders] == expected
    assert next(iter(loaders[0]))["images"].shape == (7, 3, 32, 32)
    assert len(CorruptedData(DigitsData(["hard"])).predict_dataloader()) == len(CORRUPTIONS) * 5
    with pytest.raises(UserError, match=r"no corruption 'sepia'.*gaussian_noise.*jpeg_compression"):
        CorruptedData(DigitsData(["hard"]), corruptions=["fog", "sepia"])
    with pytest.raises(UserError, match="is 1 to 5, and 0 was given"):
        CorruptedData(DigitsData(["hard"]), severities=[0])
