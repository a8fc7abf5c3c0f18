"""Folders of a user's own images."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from featinv_pl.data.folders import ORDER_SEED, FolderData, FolderImages
from featinv_pl.errors import UserError


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
    save(tmp_path / "loose.png")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    assert keys(FolderImages(tmp_path, "s", 8)) == ["a/one.JPG"]


def test_files_that_differ_in_their_suffix_have_keys_of_their_own(tmp_path: Path) -> None:
    save(tmp_path / "a" / "one.jpg")
    save(tmp_path / "a" / "one.png")
    assert len(set(keys(FolderImages(tmp_path, "s", 8)))) == 2


def test_refuses_a_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder '.*nowhere' for the source 'pets'"):
        FolderImages(tmp_path / "nowhere", "pets", 8)
    save(tmp_path / "loose.png")
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match=r"no images below '.*<class>/'.*\.jpeg, \.jpg, \.png"):
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
    assert data.val_dataloader() == data.predict_dataloader() == []
    with pytest.raises(UserError, match=r"--data\.train"):
        data.train_dataloader()
