"""How folders become sources with labels."""

from pathlib import Path

import pytest
from PIL import Image
from timm.data import ImageNetInfo

from featinv_pl.data.layouts import class_labels, find_sources, first_per_class, labelled_images
from featinv_pl.errors import UserError


def save(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)


def test_wnids_have_the_indices_of_the_1000_classes(tmp_path: Path) -> None:
    """As in ImageNet-A and -R, whose 200 classes keep the classifier's numbers."""
    names = ImageNetInfo().label_names()
    for label in (999, 0, 285):
        save(tmp_path / names[label] / "a.JPEG")
    assert labelled_images(tmp_path) == [(f"{names[label]}/a.JPEG", label) for label in (0, 285, 999)]


def test_numbers_are_labels(tmp_path: Path) -> None:
    """As in ImageNet-V2, whose folders an order of names would mix up."""
    for name in ("0", "1", "10", "2", "100"):
        save(tmp_path / name / "a.jpeg")
    assert [label for _, label in labelled_images(tmp_path)] == [0, 1, 2, 10, 100]
    assert class_labels(tmp_path)[2] == ("2", 2)


def test_names_are_numbered_in_their_order(tmp_path: Path) -> None:
    save(tmp_path / "owl/a.png", tmp_path / "ant/b.png", tmp_path / "ant/a.png")
    assert labelled_images(tmp_path) == [("ant/a.png", 0), ("ant/b.png", 0), ("owl/a.png", 1)]


def test_images_without_folders_have_no_label(tmp_path: Path) -> None:
    save(tmp_path / "b.png", tmp_path / "a.JPG")
    (tmp_path / "notes").mkdir()
    assert labelled_images(tmp_path) == [("a.JPG", -1), ("b.png", -1)]


@pytest.mark.parametrize("stranger", ["n99999999", "owls", "5"])
def test_a_class_that_maps_to_nothing_is_one_clear_error(stranger: str, tmp_path: Path) -> None:
    save(tmp_path / "n01440764" / "a.JPEG", tmp_path / stranger / "a.JPEG")
    with pytest.raises(UserError, match=rf"'.*/{stranger}' is no class of ImageNet's 1000, and folders beside it are"):
        labelled_images(tmp_path)


def test_nested_folders_are_several_sources(tmp_path: Path) -> None:
    """As in ImageNet-C."""
    for name in ("fog/3", "fog/1", "snow/1"):
        save(tmp_path / name / "n01440764" / "a.JPEG")
    (tmp_path / "fog/notes").mkdir()
    assert find_sources("c", tmp_path) == {f"c/{name}": tmp_path / name for name in ("fog/1", "fog/3", "snow/1")}
    assert find_sources("one", tmp_path / "fog/1") == {"one": tmp_path / "fog/1"}
    assert find_sources("flat", tmp_path / "fog/1/n01440764") == {"flat": tmp_path / "fog/1/n01440764"}


def test_refuses_what_holds_no_images(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    with pytest.raises(UserError, match="no images in"):
        find_sources("x", tmp_path)
    with pytest.raises(UserError, match=r"no folder '.*nowhere' for the source 'x'"):
        find_sources("x", tmp_path / "nowhere")


def test_the_first_of_each_class_by_name() -> None:
    images = [(f"{label}/{name}.png", label) for label in (0, 2) for name in "abcd"] + [("3/a.png", 3)]
    assert [name for name, _ in first_per_class(images, 2)] == ["0/a.png", "0/b.png", "2/a.png", "2/b.png", "3/a.png"]
