"""How folders become sources with classes."""

from pathlib import Path

import pytest
from PIL import Image

from featinv_pl.data.images.datamodule import FolderData
from featinv_pl.data.images.layouts import find_sources, labelled_images
from featinv_pl.data.images.sources import FolderImages
from featinv_pl.decoding import SUFFIXES
from featinv_pl.errors import UserError


def save(*paths: Path | str) -> None:
    for path in map(Path, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path, "PNG")


def sources_of(root: Path | str) -> dict[str, str]:
    return {name: path.as_posix() for name, path in find_sources("x", Path(root)).items()}


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
    (val,) = FolderData(Path("t/train"), Path("t/val"), image_size=8).val_dataloader()
    ((key, label),) = ((batch["key"], batch["labels"].tolist()) for batch in val)
    assert dict(zip(key, label, strict=True)) == {"images/val_0.JPEG": 1, "images/val_1.JPEG": 0}


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
