"""Folders of a user's own images."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform

from featinv_pl.data.images.datamodule import FolderData
from featinv_pl.data.images.folders import ORDER_SEED, FolderImages
from featinv_pl.errors import UserError
from featinv_pl.types import to_uint8


def save(path: Path, size: tuple[int, int] = (40, 30), mode: str = "RGB", colour: int | tuple[int, ...] = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Ten images of each of three classes, made in an order that is not theirs."""
    for name in ("owl", "ant", "Bee"):
        for number in reversed(range(10)):
            save(tmp_path / "pets" / name / f"{number}.png", colour=(number, 0, 0))
    return tmp_path / "pets"


def keys(images: FolderImages) -> list[str]:
    return [images[item]["key"] for item in range(len(images))]


def test_labels_follow_sorted_names(root: Path) -> None:
    images = FolderImages(root, "pets", 16)
    labels = {sample["key"].split("/")[0]: sample["labels"] for sample in (images[item] for item in range(30))}
    assert labels == {"Bee": 0, "ant": 1, "owl": 2}
    assert images[0]["source"] == "pets"


def test_order_is_random_and_fixed(root: Path, tmp_path: Path) -> None:
    order = keys(FolderImages(root, "pets", 16))
    by_name = [f"{name}/{number}.png" for name in ("Bee", "ant", "owl") for number in range(10)]
    rng = torch.Generator().manual_seed(ORDER_SEED)
    assert order == [by_name[index] for index in torch.randperm(30, generator=rng)]
    assert {key.split("/")[0] for key in order[:10]} == {"Bee", "ant", "owl"}
    torch.manual_seed(7)
    moved = root.rename(tmp_path / "moved")
    assert keys(FolderImages(moved, "other", 24)) == order


def test_image_belongs_to_its_key(root: Path) -> None:
    images = FolderImages(root, "pets", 16)
    for item in range(30):
        sample = images[item]
        number = int(Path(sample["key"]).stem)
        red, green, blue = (channel.unique().tolist() for channel in sample["images"])
        assert red == pytest.approx([number / 127.5 - 1])
        assert green == blue == [-1]


@pytest.mark.parametrize("size", [(64, 32), (32, 64), (256, 128)])
def test_crop_is_central_and_square(size: tuple[int, int], tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    image, short = Image.new("RGB", size, (0, 0, 0)), min(size)
    white = Image.new("RGB", (short, short), (255, 255, 255))
    image.paste(white, ((size[0] - short) // 2, (size[1] - short) // 2))
    image.save(tmp_path / "a" / "white.png")
    drawn = FolderImages(tmp_path, "s", 32)[0]["images"]
    assert drawn.shape == (3, 32, 32)
    assert drawn[:, 3:-3, 3:-3].min() == 1
    assert drawn.mean() > 0.9  # but for a rim, where resizing mixes in the black


@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 0.95, 1.0])
def test_crop_is_that_by_which_timm_evaluates(crop_pct: float, tmp_path: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (301, 443, 3), np.uint8))
    picture.save(tmp_path / "noise.png")
    transform = create_transform((3, 224, 224), interpolation="bicubic", crop_pct=crop_pct)
    theirs = transform(picture) * torch.tensor(IMAGENET_DEFAULT_STD).view(3, 1, 1)
    theirs += torch.tensor(IMAGENET_DEFAULT_MEAN).view(3, 1, 1)
    ours = FolderImages(tmp_path, "s", 224, crop_pct)[0]["images"]
    torch.testing.assert_close((ours + 1) / 2, theirs, rtol=0, atol=1e-6)


def test_crop_pct_keeps_that_share_of_the_shorter_side(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    image = Image.new("RGB", (64, 64), (0, 0, 0))
    image.paste((255, 255, 255), (16, 16, 48, 48))
    image.save(tmp_path / "a" / "white.png")
    assert FolderImages(tmp_path, "s", 32, crop_pct=0.5)[0]["images"].min() == 1
    whole = FolderImages(tmp_path, "s", 32)[0]["images"]
    assert whole.mean() == pytest.approx(-0.5, abs=0.05)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [("L", 51, (51, 51, 51)), ("RGBA", (10, 20, 30, 255), (10, 20, 30)), ("1", 1, (255, 255, 255))],
)
def test_any_mode_becomes_colour(
    mode: str, colour: int | tuple[int, ...], expected: tuple[int, ...], tmp_path: Path
) -> None:
    save(tmp_path / "a" / "image.png", mode=mode, colour=colour)
    image = FolderImages(tmp_path, "s", 8)[0]["images"]
    torch.testing.assert_close(image, (torch.tensor(expected) / 127.5 - 1).view(3, 1, 1).expand(3, 8, 8))


def test_other_files_are_passed_over(tmp_path: Path) -> None:
    save(tmp_path / "a" / "one.JPG")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    assert keys(FolderImages(tmp_path, "s", 8)) == ["a/one.JPG"]


def test_files_that_differ_in_their_suffix_have_keys_of_their_own(tmp_path: Path) -> None:
    save(tmp_path / "a" / "one.jpg")
    save(tmp_path / "a" / "one.png")
    assert len(set(keys(FolderImages(tmp_path, "s", 8)))) == 2


def test_refuses_a_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder '.*nowhere'"):
        FolderImages(tmp_path / "nowhere", "pets", 8)
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match=r"no images in '.*' or below '.*<class>/'.*\.jpe, \.jpeg, \.jpg, .*\.png"):
        FolderImages(tmp_path, "pets", 8)


@pytest.mark.parametrize("share", [0, 0.5])
def test_names_a_file_that_cannot_be_read(share: float, tmp_path: Path) -> None:
    path = tmp_path / "a" / "broken.png"
    path.parent.mkdir()
    Image.effect_noise((64, 64), 50).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(UserError, match=r"'.*broken\.png' cannot be read as an image"):
        FolderImages(tmp_path, "s", 8)[0]


def test_loaders(root: Path) -> None:
    data = FolderData(root, root, {"one": root, "two": root}, image_size=16, batch_size=8)
    order = keys(FolderImages(root, "", 16))
    trained = [key for batch in data.train_dataloader() for key in batch["key"]]
    assert len(set(trained)) == len(trained) == 24  # whole batches only
    assert trained != order[:24]
    (val,) = data.val_dataloader()
    batches = list(val)
    assert [key for batch in batches for key in batch["key"]] == order
    assert batches[-1]["images"].shape == (6, 3, 16, 16)
    assert batches[0]["labels"].tolist() == [["Bee", "ant", "owl"].index(key.split("/")[0]) for key in order[:8]]
    one, two = data.predict_dataloader()
    assert [batch["source"][0] for loader in (one, two) for batch in loader] == ["one"] * 4 + ["two"] * 4


def test_training_on_less_than_a_batch_keeps_it(root: Path) -> None:
    (batch,) = FolderData(root, image_size=16, batch_size=64).train_dataloader()
    assert len(batch["key"]) == 30


def test_training_needs_images_and_validation_does_not() -> None:
    data = FolderData()
    assert [*data.val_dataloader(), *data.predict_dataloader()] == []
    with pytest.raises(UserError, match=r"`data\.train`"):
        data.train_dataloader()


# Observation


def views_of(root: Path, **more: Any) -> FolderImages:
    return FolderImages(root, "pets", 16, **{"views": 3, **more})


def test_views_follow_each_other_over_all_images(root: Path) -> None:
    images, central = views_of(root), FolderImages(root, "pets", 16)
    assert len(images) == 90
    for item in (0, 29, 30, 89):
        sample, view = images[item], images[item]["view"]
        assert sample["key"] == f"{central[item % 30]['key']}#{item // 30}"
        assert sample["labels"] == central[item % 30]["labels"]
        assert view is not None
        assert view["number"] == item // 30
    assert central[0]["view"] is None


def test_views_are_functions_of_seed_key_and_number(root: Path, tmp_path: Path) -> None:
    noise = Image.effect_noise((40, 30), 80).convert("RGB")
    for path in root.rglob("*.png"):
        noise.save(path)
    first = [views_of(root)[item] for item in range(90)]
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again = views_of(root)
    for item in reversed(range(90)):
        assert torch.equal(again[item]["images"], first[item]["images"])
        assert again[item]["view"] == first[item]["view"]
    assert torch.equal(torch.get_rng_state(), state)
    crops = {view["crop"] for sample in first if (view := sample["view"])}
    assert len(crops) > 80
    other = views_of(root, seed=1)
    assert sum(other[item]["view"] == first[item]["view"] for item in range(90)) < 5


def test_a_view_can_be_drawn_again_from_its_record(root: Path) -> None:
    noise = Image.effect_noise((40, 30), 80).convert("RGB")
    for path in root.rglob("*.png"):
        noise.save(path)
    images = views_of(root, views=8, vertical_flip=True)
    seen = set()
    for item in range(0, 240, 7):
        sample = images[item]
        view = sample["view"]
        assert view is not None
        top, left, height, width = view["crop"]
        cut = noise.crop((left, top, left + width, top + height)).resize((16, 16), Image.Resampling.BICUBIC)
        if "h" in view["flips"]:
            cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if "v" in view["flips"]:
            cut = cut.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        assert np.array_equal(to_uint8(sample["images"]).permute(1, 2, 0).numpy(), np.asarray(cut))
        seen.add(view["flips"])
    assert seen == {"", "h", "v", "hv"}
    upright = views_of(root)
    views = [upright[item]["view"] for item in range(90)]
    assert {view["flips"] for view in views if view is not None} == {"", "h"}


def test_preparation_tells_sources_apart(root: Path) -> None:
    names = [views_of(root, **more).preparation for more in ({}, {"views": 2}, {"seed": 1}, {"vertical_flip": True})]
    names += [FolderImages(root, "pets", 16, crop).preparation for crop in (1.0, 0.9)]
    assert len(set(names)) == 6
    before = FolderImages(root, "a", 16).digest()
    assert views_of(root).digest() == before
    (root / "owl/3.png").rename(root / "ant/30.png")
    assert FolderImages(root, "a", 16).digest() != before


def test_extraction_goes_on_past_a_file_that_cannot_be_read(root: Path) -> None:
    (root / "owl/3.png").write_bytes(b"no picture")
    images = FolderImages(root, "pets", 16, tolerant=True)
    samples = [images[item] for item in range(30)]
    (bad,) = [sample for sample in samples if sample["unreadable"]]
    assert bad["key"] == "owl/3.png"
    assert bad["labels"] == 2
    assert "cannot identify image file '3.png'" in bad["unreadable"]
    assert bad["images"].unique().tolist() == [-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"views": -1}, "`views` must be 0"), ({"crop_pct": 0}, "`crop_pct` is a share")],
)
def test_refuses_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FolderData(**options)


def test_a_benchmark_of_many_sources(tmp_path: Path) -> None:
    for name in ("fog/1", "fog/3", "snow/1"):
        save(tmp_path / "c" / name / "n01440764" / "a.JPEG", size=(224, 224))
        save(tmp_path / "c" / name / "n01443537" / "a.JPEG", size=(224, 224), colour=(9, 9, 9))
    data = FolderData(predict={"imagenet-c": tmp_path / "c"}, image_size=224)
    assert [images.source for images in data.predicted] == [
        f"imagenet-c/{name}" for name in ("fog/1", "fog/3", "snow/1")
    ]
    (batch,) = data.predict_dataloader()[1]
    assert sorted(batch["labels"].tolist()) == [0, 1]
    assert set(batch["source"]) == {"imagenet-c/fog/3"}
    assert batch["images"].unique().numel() <= 4  # neither resized nor cropped: no edges, two colours
