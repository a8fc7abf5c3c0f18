"""Whether a stranger could say which reconstruction belongs to which photo.

python experiments/photos/matching.py FOLDER

The stranger is MobileNetV2, which neither training nor guidance has seen: each reconstruction is given to the photo of
FOLDER (64 px) whose feature map is most similar to its own, by the cosine averaged over locations. Prints how many are
given rightly, for the inverters of `make study-photos`.
"""

import argparse
from pathlib import Path
from typing import cast

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from featinv_pl import FeatInvPipeline
from featinv_pl.explore.exploration import classify
from featinv_pl.nets.backbone import Backbone

JUDGE = "data/photos/mobilenetv2"


def main() -> None:
    """Reconstruct once from seed 0, and match."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--models", nargs="+", default=[f"runs/study/photos/{kind}/0" for kind in ("spatial", "pooled")]
    )
    options = parser.parse_args()
    photos = [Image.open(path).convert("RGB") for path in sorted(options.folder.iterdir())]
    judge = Backbone(JUDGE)
    for model in options.models:
        pipeline = FeatInvPipeline.from_pretrained(model)
        originals = judge.classify(classify(pipeline, photos)["images"])["features"]
        images = cast(Tensor, pipeline(photos, seed=0, output_type="pt").images)
        found = judge.classify(2 * images - 1)["features"]
        similarity = torch.einsum("ochw,rchw->ro", normalize(originals, dim=1), normalize(found, dim=1))
        right = (similarity.argmax(dim=1) == torch.arange(len(photos))).sum()
        print(f"{model}: {right} of {len(photos)}")


if __name__ == "__main__":
    main()
