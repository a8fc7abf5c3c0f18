"""Lay out CIFAR-10 in data/cifar10.

python experiments/cifar10/divide.py ARCHIVE

ARCHIVE is a zip of images, train/<class>/ and test/<class>/. Of the training images of each class the last hundred by
name are held out, to choose settings on; nothing is trained on them. The test images are for the table alone.
"""

import sys
from itertools import groupby
from pathlib import Path, PurePosixPath
from zipfile import ZipFile

DATA, HELD_OUT = Path("data/cifar10"), 100


def main(archive: Path) -> None:
    """Write every image of the archive to its part."""
    with ZipFile(archive) as members:
        names = sorted(PurePosixPath(name) for name in members.namelist() if name.endswith((".jpg", ".png")))
        for folder, found in groupby(names, key=lambda name: name.parent):
            images = list(found)
            held_out = set(images[-HELD_OUT:]) if folder.parts[-2] == "train" else set()
            for image in images:
                place = DATA / ("val" if image in held_out else folder.parts[-2]) / folder.name / image.name
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(members.read(str(image)))
    print(f"{DATA}: {len(names):,} images. Next: make study-cifar10")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
