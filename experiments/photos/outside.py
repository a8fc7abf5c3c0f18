"""Whether what is drawn from a picture that is no photo looks like one.

python experiments/photos/outside.py

Of test photos, cue-conflict pictures and silhouettes (`make study-photos`): how similar each is to the most similar of
2,000 training photos, by the cosine of the pooled vectors of MobileNetV2, which nothing was trained or guided by. The
same of the picture after the autoencoder, which blurs alike, and of what each inverter draws from the picture's map.
Prints a table with 95 % intervals over pictures.
"""

import argparse
from pathlib import Path
from typing import cast

import numpy as np
from torch import Tensor

from featinv_pl import FeatInvPipeline
from featinv_pl.explore.exploration import Samples, autoencode, read_samples
from featinv_pl.explore.paths import Naturalness
from featinv_pl.explore.sets import cell, difference, means
from featinv_pl.nets.backbone import Backbone

SHARDS, JUDGE = Path("runs/photos/shards"), "data/photos/mobilenetv2"
SETS, REAL, AT_ONCE = ("test", "cue-conflict", "silhouettes"), 2000, 16


def nearest(pipeline: FeatInvPipeline, samples: Samples, natural: Naturalness) -> dict[str, list[float]]:
    """The cosine of each picture, its autoencoding and its drawing with the most similar photo."""
    found: dict[str, list[float]] = {"picture": [], "autoencoder": [], "drawing": []}
    for start in range(0, len(samples.keys), AT_ONCE):
        rows = range(start, min(start + AT_ONCE, len(samples.keys)))
        pictures, maps = samples.images(rows), samples.features[start : rows.stop].float()
        drawn = 2 * cast(Tensor, pipeline(features=maps, seed=start, output_type="pt").images) - 1
        for name, images in zip(found, (pictures, autoencode(pipeline, pictures)["images"], drawn), strict=True):
            found[name] += natural({"images": images[:, None], "features": maps, "logits": maps})
    return found


def main() -> None:
    """Compare, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--number", type=int, default=160, help="pictures of each set (%(default)s)")
    parser.add_argument(
        "--models", nargs="+", default=[f"runs/study/photos/{kind}/0" for kind in ("spatial", "pooled")]
    )
    options = parser.parse_args()
    natural = Naturalness(read_samples([SHARDS / "train"], REAL, "train"), Backbone(JUDGE))
    print(f"Among training photos: {natural.limits[0]:.3f} to {natural.limits[1]:.3f}\n")
    print("| model | set | n | picture | autoencoder | drawing | drawing less autoencoder |\n|" + "---|" * 7)
    for model in options.models:
        pipeline = FeatInvPipeline.from_pretrained(model)
        for name in SETS:
            samples = read_samples([SHARDS / name], options.number, name)
            values = {kind: np.array(one) for kind, one in nearest(pipeline, samples, natural).items()}
            cells = [cell(means(samples.keys, one[:, None], False)[0]) for one in values.values()]
            less = difference(samples.keys, values["drawing"], values["autoencoder"], False).estimate
            print(f"| {model} | {name} | {len(samples.keys)} | {' | '.join(cells)} | {cell(less)} |", flush=True)


if __name__ == "__main__":
    main()
