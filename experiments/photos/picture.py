"""The README's picture: photos above what inverters make of their feature maps and of the mean of these.

python experiments/photos/picture.py FOLDER NAME... --out docs/photos/readme.jpg

FOLDER holds photos of 64 px, of which those are shown whose names begin with a NAME. The inverters are those of
`make study-photos`, spatial above pooled, and refine towards the map and towards its mean. Prints the cosine of each
reconstruction with its photo's feature map.
"""

import argparse
from pathlib import Path
from typing import cast

from PIL import Image

from featinv_pl import FeatInvPipeline
from featinv_pl.explore.exploration import classify
from featinv_pl.inverter.outputs import as_picture
from featinv_pl.sampling.sampler import Refinement

SIDE, GAP = 144, 4  # pixels


def main() -> None:
    """Reconstruct once from seed 0, and paste the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--models", nargs=2, default=[f"runs/study/photos/{kind}/0" for kind in ("spatial", "pooled")])
    parser.add_argument("--out", type=Path, default=Path("docs/photos/readme.jpg"))
    options = parser.parse_args()
    photos = [Image.open(next(options.folder.glob(f"{name}*"))).convert("RGB") for name in options.names]
    rows: list[list[Image.Image]] = []
    for model in options.models:
        pipeline = FeatInvPipeline.from_pretrained(model).with_sampler(refine=Refinement())
        if not rows:  # what of the photos the classifier sees
            rows.append([as_picture(image) for image in classify(pipeline, photos)["images"]])
        output = pipeline(photos, seed=0)
        print(model, *(f"{cosine:.3f}" for cosine in output.cosine))
        rows.append(cast(list[Image.Image], output.images))
    picture = Image.new("RGB", ((SIDE + GAP) * len(photos) - GAP, (SIDE + GAP) * len(rows) - GAP), "white")
    for top, row in enumerate(rows):
        for left, image in enumerate(row):
            shown = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            picture.paste(shown, (left * (SIDE + GAP), top * (SIDE + GAP)))
    picture.save(options.out, quality=88)


if __name__ == "__main__":
    main()
