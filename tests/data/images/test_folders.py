"""Folders of a user's own images."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform

from featinv_pl.data.images.datamodule import FolderData
from featinv_pl.data.images.sources import ORDER_SEED, FolderImages
from featinv_pl.errors import UserError
from featinv_pl.types import to_uint8

CLASSES = ["Bee", "ant", "owl"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Ten images of each of three classes, made in an order that is not theirs."""
    for name in reversed(CLASSES):
        for number in reversed(range(10)):
            path = tmp_path / "pets" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 30), (number, 0, 0)).save(path)
    return tmp_path / "pets"


@pytest.fixture
def noise(root: Path) -> Image.Image:
    """What all images of the folder show instead."""
    noise = Image.effect_noise((40, 30), 80).convert("RGB")
    for path in root.rglob("*.png"):
        noise.save(path)
    return noise


def views_of(root: Path, **more: Any) -> FolderImages:
    return FolderImages(root, "pets", 16, **{"views": 3, **more})


def keys(images: FolderImages) -> list[str]:
    return [images[item].key for item in range(len(images))]


def test_order_is_random_and_fixed(root: Path, tmp_path: Path) -> None:
    order = keys(FolderImages(root, "pets", 16))
    by_name = [f"{name}/{number}.png" for name in CLASSES for number in range(10)]
    rng = torch.Generator().manual_seed(ORDER_SEED)
    assert order == [by_name[index] for index in torch.randperm(30, generator=rng)]
    assert {key.split("/")[0] for key in order[:10]} == {*CLASSES}
    torch.manual_seed(7)
    moved = root.rename(tmp_path / "moved")
    assert keys(FolderImages(moved, "other", 24)) == order


def test_image_belongs_to_its_key(root: Path) -> None:
    for sample in map(FolderImages(root, "pets", 16).__getitem__, range(30)):
        name, number = sample.key.removesuffix(".png").split("/")
        assert (sample.labels, sample.class_name) == (CLASSES.index(name), name)
        assert sample.images[0].unique().tolist() == pytest.approx([int(number) / 127.5 - 1])
        assert sample.images[1:].unique().tolist() == [-1]


@pytest.mark.parametrize("crop_pct", [0.875, 0.95, 1.0])
def test_crop_is_that_by_which_timm_evaluates(crop_pct: float, tmp_path: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (301, 443, 3), np.uint8))
    picture.save(tmp_path / "noise.png")
    transform = create_transform((3, 224, 224), interpolation="bicubic", crop_pct=crop_pct)
    theirs = transform(picture) * torch.tensor(IMAGENET_DEFAULT_STD).view(3, 1, 1)
    theirs += torch.tensor(IMAGENET_DEFAULT_MEAN).view(3, 1, 1)
    ours = FolderImages(tmp_path, "s", 224, crop_pct)[0].images
    torch.testing.assert_close((ours + 1) / 2, theirs, rtol=0, atol=1e-6)


def test_loaders(root: Path) -> None:
    data = FolderData(root, root, {"one": root, "two": root}, image_size=16, batch_size=8)
    order = keys(FolderImages(root, "", 16))
    trained = [key for batch in data.train_dataloader() for key in batch["key"]]
    assert len(set(trained)) == len(trained) == 24  # complete batches only
    assert trained != order[:24]
    (batch,) = FolderData(root, image_size=16, batch_size=64).train_dataloader()
    assert len(batch["key"]) == 30  # but for fewer images than a batch has
    (val,) = data.val_dataloader()
    batches = list(val)
    assert [key for batch in batches for key in batch["key"]] == order
    assert batches[-1]["images"].shape == (6, 3, 16, 16)
    assert batches[0]["labels"].tolist() == [CLASSES.index(key.split("/")[0]) for key in order[:8]]
    one, two = data.predict_dataloader()
    assert [batch["source"][0] for loader in (one, two) for batch in loader] == ["one"] * 4 + ["two"] * 4


def test_what_is_not_given_or_not_a_share_is_named() -> None:
    data = FolderData()
    assert [*data.val_dataloader(), *data.predict_dataloader()] == []
    with pytest.raises(UserError, match=r"`data\.train`"):
        data.train_dataloader()
    with pytest.raises(UserError, match="`crop_pct` is a share"):
        FolderData(crop_pct=87.5)


def test_views_follow_each_other_over_all_images(root: Path) -> None:
    images, central = views_of(root), FolderImages(root, "pets", 16)
    assert len(images) == 90
    for item in (0, 29, 30, 89):
        number, image = divmod(item, 30)
        assert images[item].key == f"{central[image].key}#{number}"
        assert images[item].labels == central[image].labels
        assert (images[item].view or {})["number"] == number
    assert central[0].view is None


def test_views_are_functions_of_seed_key_and_number(root: Path, noise: Image.Image) -> None:
    items, images, again = range(0, 90, 4), views_of(root), views_of(root)
    first = {item: images[item] for item in items}
    torch.manual_seed(99)
    state = torch.get_rng_state()
    for item in reversed(items):
        assert torch.equal(again[item].images, first[item].images)
        assert again[item].view == first[item].view
    assert torch.equal(torch.get_rng_state(), state)
    assert len({view["crop"] for sample in first.values() if (view := sample.view)}) > 20
    other = views_of(root, seed=1)
    assert sum(other[item].view == first[item].view for item in items) < 2


def test_a_view_can_be_drawn_again_from_its_record(root: Path, noise: Image.Image) -> None:
    images = views_of(root, views=8, vertical_flip=True)
    seen = set()
    for item in range(0, 240, 11):
        view = images[item].view
        assert view is not None
        top, left, height, width = view["crop"]
        cut = noise.crop((left, top, left + width, top + height)).resize((16, 16), Image.Resampling.BICUBIC)
        if "h" in view["flips"]:
            cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if "v" in view["flips"]:
            cut = cut.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        assert np.array_equal(to_uint8(images[item].images).permute(1, 2, 0).numpy(), np.asarray(cut))
        seen.add(view["flips"])
    assert seen == {"", "h", "v", "hv"}
    upright = [views_of(root)[item].view for item in range(0, 90, 9)]
    assert {view["flips"] for view in upright if view is not None} == {"", "h"}


def test_preparation_and_digest_tell_sources_apart(root: Path) -> None:
    names = [views_of(root, **more).preparation for more in ({}, {"views": 2}, {"seed": 1}, {"vertical_flip": True})]
    names += [FolderImages(root, "pets", 16, crop).preparation for crop in (1.0, 0.9)]
    assert len(set(names)) == 6
    before = FolderImages(root, "a", 16).digest()
    assert views_of(root).digest() == before
    (root / "owl/3.png").rename(root / "ant/30.png")
    assert FolderImages(root, "a", 16).digest() != before


@pytest.mark.parametrize("share", [0, 0.5])
def test_a_file_that_cannot_be_read_ends_training_and_not_extraction(share: float, root: Path) -> None:
    data = (root / "owl/3.png").read_bytes()
    (root / "owl/3.png").write_bytes(data[: int(share * len(data))])
    with pytest.raises(UserError, match=r"'.*owl/3\.png' cannot be read as an image"):
        keys(FolderImages(root, "pets", 16))
    images = FolderImages(root, "pets", 16, tolerant=True)
    (bad,) = [sample for sample in map(images.__getitem__, range(30)) if sample.unreadable]
    assert (bad.key, bad.labels) == ("owl/3.png", 2)
    assert "image file" in bad.unreadable
    assert bad.images.unique().tolist() == [-1]
