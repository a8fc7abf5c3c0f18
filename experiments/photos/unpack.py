"""Lay out the photos and weights of the study in data/photos.

python experiments/photos/unpack.py FOLDER

FOLDER holds, at any depth, tiny-imagenet-64px.zip (train/<wnid>/, val/<wnid>/), cue-conflict-224px.zip
(<kind>/<class>/), and the weights tf_efficientnet_lite0.safetensors, mobilenetv2_100.safetensors and
taef2.safetensors. Of the training photos of each class the last five by name are held out, to choose settings on; the
archive's validation photos are the test set.
"""

import json
import shutil
import sys
from pathlib import Path, PurePosixPath
from zipfile import ZipFile

DATA, HELD_OUT = Path("data/photos"), 5
WEIGHTS = ("tf_efficientnet_lite0.safetensors", "taef2.safetensors")
JUDGE = {  # as the weights' author evaluates them
    "architecture": "mobilenetv2_100",
    "num_classes": 1000,
    "pretrained_cfg": {
        "input_size": [3, 225, 225],
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "interpolation": "bicubic",
        "crop_pct": 1.0,
    },
}


def find(folder: Path, name: str) -> Path:
    """The file of that name, at any depth."""
    if not (found := sorted(folder.rglob(name))):
        sys.exit(f"'{folder}' holds no {name}. The head of experiments/photos/unpack.py says what is needed.")
    return found[0]


def unpack(archive: Path, places: dict[str, Path]) -> None:
    """Write members of an archive to places of their own."""
    with ZipFile(archive) as members:
        for name, place in places.items():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(members.read(name))


def images(archive: Path) -> list[PurePosixPath]:
    """The images in an archive, sorted."""
    names = ZipFile(archive).namelist()
    return sorted(PurePosixPath(name) for name in names if name.lower().endswith((".jpeg", ".jpg", ".png")))


def main(folder: Path) -> None:
    """Copy weights, and unpack photos."""
    photos, shapes = (find(folder, name) for name in ("tiny-imagenet-64px.zip", "cue-conflict-224px.zip"))
    weights, judge = [find(folder, name) for name in WEIGHTS], find(folder, "mobilenetv2_100.safetensors")
    places: dict[str, Path] = {}
    classes: dict[PurePosixPath, list[PurePosixPath]] = {}
    for image in images(photos):
        classes.setdefault(image.parent, []).append(image)
    for parent, members in classes.items():
        for number, image in enumerate(members):
            part = "test" if parent.parts[-2] == "val" else "train" if number < len(members) - HELD_OUT else "val"
            places[str(image)] = DATA / part / parent.name / image.name
    unpack(photos, places)
    unpack(shapes, {str(image): DATA.joinpath("shapes", *image.parts[-3:]) for image in images(shapes)})
    (DATA / "mobilenetv2").mkdir(exist_ok=True)
    (DATA / "mobilenetv2/config.json").write_text(json.dumps(JUDGE))
    shutil.copy(judge, DATA / "mobilenetv2/model.safetensors")
    for file in weights:
        shutil.copy(file, DATA / file.name)
    print(f"{DATA}: {len(places):,} photos and three networks. Next: make study-photos")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
