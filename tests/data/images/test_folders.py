"""Folders of a user's own images: how they become sources with classes, crops and views."""

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform

from featinv_pl.data.images.datamodule import CorruptedData, DividedFolder, FolderData
from featinv_pl.data.images.layouts import find_sources, labelled_images
from featinv_pl.data.images.sources import ORDER_SEED, FolderImages
from featinv_pl.data.order import Batches
from featinv_pl.decoding import SUFFIXES
from featinv_pl.errors import UserError
from featinv_pl.types import ImageBatch

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


def save(*paths: Path | str) -> None:
    for path in map(Path, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path, "PNG")


def sources_of(root: Path | str) -> dict[str, str]:
    return {name: path.as_posix() for name, path in find_sources("x", Path(root)).items()}


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
        assert sample.images[0].unique().tolist() == [int(number)]
        assert sample.images[1:].unique().tolist() == [0]


@pytest.mark.parametrize("crop_pct", [0.875, 0.95, 1.0])
def test_crop_is_that_by_which_timm_evaluates(crop_pct: float, tmp_path: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (301, 443, 3), np.uint8))
    picture.save(tmp_path / "noise.png")
    transform = create_transform((3, 224, 224), interpolation="bicubic", crop_pct=crop_pct)
    theirs = transform(picture) * torch.tensor(IMAGENET_DEFAULT_STD).view(3, 1, 1)
    theirs += torch.tensor(IMAGENET_DEFAULT_MEAN).view(3, 1, 1)
    ours = FolderImages(tmp_path, "s", 224, crop_pct)[0].images
    torch.testing.assert_close(ours / 255, theirs, rtol=0, atol=1e-6)


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


def augmented(
    root: Path, world: tuple[int, int] = (0, 1), seen: int = 0, epochs: int = 2, seed: int = 0, **more: Any
) -> Iterator[tuple[int, ImageBatch]]:
    """Batches of training by epoch, the first of which `seen` batches are left out of, as after resuming."""
    torch.manual_seed(seed)
    data = FolderData(root, root, image_size=32, batch_size=8 // world[1], augment=True, **more)
    data.trainer = cast(Any, SimpleNamespace(global_rank=world[0], world_size=world[1]))
    order = {"samples": 30, "batch_size": 8 // world[1], "processes": world[1], "seed": torch.initial_seed()}
    data.load_state_dict({"epoch": 0, "batches": seen, "order": order})
    loader = data.train_dataloader()
    for epoch in range(epochs):
        cast(Batches, loader.sampler).set_epoch(epoch)
        yield from ((epoch, batch) for batch in loader)


def test_augmentation_follows_from_seed_epoch_and_key(root: Path, noise: Image.Image) -> None:
    def images(*args: Any, **more: Any) -> dict[tuple[int, str], bytes]:
        batches = augmented(root, *args, **more)
        return {
            (epoch, key): image.numpy().tobytes()
            for epoch, batch in batches
            for key, image in zip(batch["key"], batch["images"], strict=True)
        }

    found = images()
    assert len(found) == 48
    assert len({*found.values()}) > 35  # of the same picture, which has 9 * 9 * 2 of them
    resumed = images(seen=1, num_workers=2)
    assert resumed == {name: image for place, (name, image) in enumerate(found.items()) if place >= 8}
    assert images((0, 2)) | images((1, 2)) == found
    other = images(seed=1)
    assert sum(found[name] == other[name] for name in found.keys() & other.keys()) < 4
    data = FolderData(root, root, image_size=32, augment=True)
    ((val,),), (plain,) = data.val_dataloader(), FolderData(val=root, image_size=32).val_dataloader()
    assert torch.equal(val["images"], next(iter(plain))["images"])


def test_augmentation_shifts_by_an_eighth_and_flips_half(root: Path) -> None:
    rows, columns = np.mgrid[10:42, 10:42].astype(np.uint8)
    for path in root.rglob("*.png"):
        Image.fromarray(np.stack([rows, columns, rows], axis=2)).save(path)
    shifts: list[tuple[int, int]] = []
    flips = []
    for _, batch in augmented(root, epochs=60):
        for image in batch["images"].int():
            flips.append(bool(image[1, 16, 16] > image[1, 16, 17]))
            shown = image.flip(2) if flips[-1] else image
            down, right = 26 - int(shown[0, 16, 16]), 26 - int(shown[1, 16, 16])  # by what the centre shows
            black = np.pad(np.stack([rows, columns, rows]), [(0, 0), (4, 4), (4, 4)])
            assert np.array_equal(shown, black[:, 4 - down : 36 - down, 4 - right : 36 - right])
            shifts.append((down, right))
    assert np.mean(flips) == pytest.approx(0.5, abs=0.05)
    for along in zip(*shifts, strict=True):
        assert {*along} == {*range(-4, 5)}
        assert [count / len(along) for count in Counter(along).values()] == pytest.approx([1 / 9] * 9, abs=0.03)
    assert abs(np.corrcoef([*zip(*shifts, strict=True), flips])[np.triu_indices(3, 1)]).max() < 0.1


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
        view = images[item].view
        assert view is not None
        assert view["number"] == number
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
        assert np.array_equal(images[item].images.permute(1, 2, 0).numpy(), np.asarray(cut))
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
    assert bad.images.unique().tolist() == [0]


# Classes


@pytest.mark.parametrize(
    "names", [["n01440764", "n02123045"], ["owl", "ant", "Bee"], ["0", "2", "10", "100"], ["a b", "é", "x.y"]]
)
def test_folders_are_classes_to_any_depth(names: list[str]) -> None:
    for depth in ("", "images/", "images/2019/may/"):
        save(*(f"root/{name}/{depth}{name}-{len(depth)}.png" for name in names))
    seen = labelled_images(Path("root"))
    assert {path.split("/")[0] == name for path, name in seen} == {True}
    assert len(seen) == 3 * len(names)
    expected = sorted(names, key=int) if names[0].isdecimal() else sorted(names)
    assert list(dict.fromkeys(name for _, name in seen)) == list(FolderImages(Path("root"), "x", 8).classes) == expected
    assert sources_of("root") == {"x": "root"}


def test_tiny_imagenet() -> None:
    """As its archive unpacks: training images two levels down, validation's classes in a table, test without any."""
    save("t/train/n01440764/images/n01440764_0.JPEG", "t/train/n01443537/images/n01443537_0.JPEG")
    save("t/val/images/val_0.JPEG", "t/val/images/val_1.JPEG", "t/test/images/test_0.JPEG")
    Path("t/train/n01440764/n01440764_boxes.txt").write_text("n01440764_0.JPEG\t0\t0\t8\t8\n")
    table = "val_0.JPEG\tn01443537\t0\t0\t8\t8\nval_1.JPEG\tn01440764\t0\t0\t8\t8\n"
    Path("t/val/val_annotations.txt").write_text(table)
    assert sources_of("t") == {"x/train": "t/train", "x/val": "t/val", "x/test": "t/test"}
    assert [name for _, name in labelled_images(Path("t/train"))] == ["n01440764", "n01443537"]
    assert dict(labelled_images(Path("t/val"))) == {"images/val_0.JPEG": "n01443537", "images/val_1.JPEG": "n01440764"}


def test_train_numbers_the_classes_of_a_validation_folder_that_lacks_some() -> None:
    save("train/ant/a.png", "train/bee/a.png", "train/owl/a.png", "val/owl/b.png", "val/bee/b.png", "val/yak/b.png")
    data = FolderData(Path("train"), Path("val"), image_size=8)
    assert data.classes == ("ant", "bee", "owl")
    ((batch,),) = data.val_dataloader()
    assert dict(zip(batch["class_name"], batch["labels"].tolist(), strict=True)) == {"bee": 1, "owl": 2, "yak": -1}


def test_images_without_folders_have_no_class() -> None:
    save("flat/b.png", "flat/a.JPG")
    Path("flat/notes").mkdir()
    assert labelled_images(Path("flat")) == [("a.JPG", ""), ("b.png", "")]
    assert FolderImages(Path("flat"), "x", 8)[0].labels == -1


def test_every_suffix_counts_and_nothing_that_systems_leave() -> None:
    """A class whose name sorts first, or an image more, would shift the labels of all others."""
    save(*(f"root/ant/image{suffix}" for suffix in SUFFIXES), *(f"root/owl/i{suffix.upper()}" for suffix in SUFFIXES))
    assert {".jpg", ".jpeg", ".jpe", ".jfif", ".tif", ".ppm", ".gif"} < SUFFIXES
    litter = ("__MACOSX/ant/._a.jpg", "@eaDir/a.jpg", ".ipynb_checkpoints/a.png", ".hidden/a.png")
    save(*(f"root/{name}" for name in litter), *(f"root/ant/{name}" for name in ("._a.jpg", ".a.png", *litter)))
    for name in ("Thumbs.db", ".DS_Store", "labels.csv", "ant/Thumbs.db"):
        Path("root", name).write_bytes(b"no image")
    Path("root/aardvark").mkdir()  # holds nothing
    seen = labelled_images(Path("root"))
    assert len(seen) == 2 * len(SUFFIXES)
    assert FolderImages(Path("root"), "x", 8).classes == ("ant", "owl")


def test_the_first_of_each_class_by_name() -> None:
    save(*(f"root/{label}/{name}.png" for label in "02" for name in "dbca"), "root/3/a.png")
    chosen = [name for name, _ in labelled_images(Path("root"), per_class=2)]
    assert chosen == ["0/a.png", "0/b.png", "2/a.png", "2/b.png", "3/a.png"]


# Sources


@pytest.mark.parametrize(
    ("images", "sources"),
    [
        (["train/n01440764/a.png", "val/b.png", "test/c.png"], ["train", "val", "test"]),  # the last two without labels
        (["train/n01440764/a.png", "val/images/b.png"], ["train", "val"]),
        (["fog/3/n01440764/a.png", "fog/1/n01440764/a.png", "snow/1/n01440764/a.png"], ["fog/1", "fog/3", "snow/1"]),
        (["fog/3/cat/a.png", "fog/1/cat/a.png", "snow/1/cat/a.png"], ["fog/1", "fog/3", "snow/1"]),
        (["imagenet-a/n01440764/a.png", "imagenet-r/n01440764/a.png"], ["imagenet-a", "imagenet-r"]),
        (["train/cat/a.png", "train/dog/a.png", "val/cat/a.png"], ["train", "val"]),
        (["train/cat/a.png", "Test/b.png"], ["train", "Test"]),
        (["train/a.png", "test/b.png"], ["train", "test"]),
        (["photos/cat/a.png", "photos/dog/a.png"], ["photos"]),
        (["train/a.png", "car/b.png"], [""]),  # a class of vehicles
        (["fog/a.png", "snow/b.png"], [""]),  # classes of weather
        (["cat/a.png", "dog/pugs/b.png"], [""]),
    ],
)
def test_sources_are_told_from_classes(images: list[str], sources: list[str]) -> None:
    save(*(f"root/{image}" for image in images))
    assert sources_of("root") == {f"x/{name}".rstrip("/"): f"root/{name}".rstrip("/") for name in sources}
    if sources != [""] and len(sources) > 1:
        with pytest.raises(UserError, match=rf"'root' holds several sets of images \(.*'{sources[0]}'.*Give one"):
            FolderImages(Path("root"), "train", 8)


@pytest.mark.parametrize(
    ("images", "readings"),
    [
        (["a.png", "cat/b.png"], [r"'a\.png'", "'cat'", "Move the images or the folders"]),
        (["a.png", "train/n01440764/b.png"], [r"'a\.png'", "'train'"]),
        (
            ["easy/cat/a.png", "easy/dog/a.png", "hard/cat/a.png"],
            ["'easy' is a class, or a set of .* a class 'cat'"],
        ),
        (
            ["train/cat/a.png", "train/dog/b.png", "more/c.png"],
            ["'train' is a class, or a set of images"],
        ),
        (["n01440764/a.png", "owls/a.png"], ["'root/owls' is not named by wnid as 'n01440764'"]),
        (["n01440764/a.png", "5/a.png"], ["'root/5' is not named by wnid"]),
    ],
)
def test_what_is_ambiguous_is_refused_with_both_readings(images: list[str], readings: list[str]) -> None:
    save(*(f"root/{image}" for image in images))
    for reading in readings:
        with pytest.raises(UserError, match=reading):
            find_sources("x", Path("root"))


def test_refuses_what_holds_no_images() -> None:
    Path("root/a/b").mkdir(parents=True)
    with pytest.raises(UserError, match="no images in"):
        find_sources("x", Path("root"))
    with pytest.raises(UserError, match=r"no folder '.*nowhere'"):
        find_sources("x", Path("nowhere"))
    save("root/a/b/c.png", "other/a.jpg", "other/b.HEIC")
    with pytest.raises(UserError, match=r"'other/b\.HEIC' is of a type that is not read"):
        find_sources("x", Path("other"))
    Path("root/a/loop").symlink_to("..")
    with pytest.raises(UserError, match=r"'root/a/loop' is a link to a folder that contains it"):
        find_sources("x", Path("root"))


def test_a_folder_to_extract_that_is_missing_is_skipped_or_refused(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folders: dict[str, str | Path] = {"gone": Path("nowhere"), "here": root, "away": Path("elsewhere")}
    data = FolderData(predict=folders, image_size=16)
    corrupted = CorruptedData(data, ["fog"], [3], batch_size=5)
    assert [next(iter(loader))["source"][0] for loader in data.predict_dataloader()] == ["here"]
    warned = [f"{name}: skipped, for there is no folder '{folders[name]}'." for name in ("gone", "away")]
    assert caplog.messages == warned
    [loader] = corrupted.predict_dataloader()
    assert [len(batch["key"]) for batch in loader] == [5] * 6
    assert caplog.messages == warned * 2
    with pytest.raises(UserError, match=r"`data.predict`: no folder .* \(gone: .*'nowhere'; away: .*'elsewhere'\)"):
        FolderData(predict={"gone": Path("nowhere"), "away": Path("elsewhere")})
    with pytest.raises(UserError, match="there is no folder 'nowhere'"):
        FolderData(predict=folders, missing="refuse")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"views": -1}, r"`views` must be 0 .* and is -1"),
        ({"per_class": 0}, "`per_class` must be at least 1, and is 0"),
        ({"crop_pct": 1.5}, r"`crop_pct` is a share .* and is 1.5"),
    ],
)
def test_options_without_a_meaning_are_refused(options: dict[str, Any], message: str, root: Path) -> None:
    with pytest.raises(UserError, match=message):
        FolderData(predict={"pets": root}, image_size=16, **options)


def test_corruptions_are_not_none(root: Path) -> None:
    with pytest.raises(UserError, match="`corruptions` and `severities` cannot be empty"):
        CorruptedData(FolderData(predict={"pets": root}, image_size=16), corruptions=[])


def test_one_folder_is_divided_by_class_and_path(root: Path, tmp_path: Path) -> None:
    data = DividedFolder(root, image_size=16, held_out=0.2, batch_size=4)
    parts = {images.source: dict(images.names()) for images in data.predicted}
    counts = {part: Counter(classes.values()) for part, classes in parts.items()}
    assert counts == {part: dict.fromkeys(CLASSES, n) for part, n in {"train": 6, "val": 2, "test": 2}.items()}
    assert sorted(key for keys in parts.values() for key in keys) == sorted(keys(FolderImages(root, "", 16)))
    assert data.train is not None
    assert data.val is not None
    assert {*data.train.names()} == {*parts["train"].items()}
    assert {*data.val.names()} == {*parts["val"].items()}
    for name in CLASSES:  # a new image in each class: few others go elsewhere
        Image.new("RGB", (40, 30)).save(root / name / "new.png")
    grown = {image.source: dict(image.names()) for image in DividedFolder(root, 16, 0.2).predicted}
    moved = [key for part, names in grown.items() for key in names if key in parts[part]]
    assert len(moved) >= 30 - 2 * len(CLASSES)
    shutil.rmtree(root / "owl")
    assert DividedFolder(root, 16, predict=["test"]).classes == ("Bee", "ant")
    for part in ("train", "val", "test"):  # divided already
        shutil.copytree(root, tmp_path / "given" / part)
    given = DividedFolder(tmp_path / "given", 16)
    assert [len(images) for images in given.predicted] == [22] * 3
    assert given.classes == ("Bee", "ant")


def test_a_folder_that_cannot_be_divided_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"`held_out` .* is 0.5"):
        DividedFolder(root, 16, held_out=0.5)
    for number in range(2, 10):
        (root / "ant" / f"{number}.png").unlink()
    with pytest.raises(UserError, match=r"`folder`: the class 'ant' has 2 images, and needs at least 3"):
        DividedFolder(root, 16)
    root.rename(tmp_path / "train")
    with pytest.raises(UserError, match=r"`folder`: '.*' holds train without the other of train, val, test"):
        DividedFolder(tmp_path, 16)
