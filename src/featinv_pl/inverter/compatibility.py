"""Whether feature shards, a trained control and a model belong together."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featinv_pl.errors import UserError
from featinv_pl.nets.backbone import Backbone
from featinv_pl.nets.prior import Prior
from featinv_pl.nets.sources import check_sums, read_index
from featinv_pl.types import Provenance


def check_shards(
    manifests: Mapping[Any, Mapping[str, Any]],
    backbone: Backbone,
    prior: Prior,
    image_size: int,
    frozen: Mapping[str, str],
) -> None:
    """Refuse shard sets that other frozen parts have made, naming both sides.

    Args:
        manifests: By folder.
        backbone: That of the model.
        prior: That of the model.
        image_size: Side of the images that the model draws, in pixels.
        frozen: Digests of the model's `backbone` and `autoencoder`.
    """
    for folder, manifest in manifests.items():
        theirs: Provenance = manifest["provenance"]
        shape = tuple(theirs["feature_shape"])
        if theirs["backbone_digest"] != frozen["backbone"] or shape != backbone.feature_shape:
            raise UserError(
                f"The shard set '{folder}' was made with the backbone '{theirs['backbone']}' (maps of {shape}, "
                f"weights {theirs['backbone_digest'][:8]}); --model.backbone is '{backbone.name}' (maps of "
                f"{backbone.feature_shape}, weights {frozen['backbone'][:8]}). "
                "Give the backbone that made the shards, or extract features with this one."
            )
        for option, made_with, ours in (
            ("layer", theirs["layer"], backbone.layer),
            ("input_size", theirs["transform"], backbone.transform_name),
            ("image_size", theirs["image_size"], image_size),
        ):
            if made_with != ours:
                raise UserError(
                    f"--model.{option}: the shard set '{folder}' was made with '{made_with}', and this model has "
                    f"'{ours}'. Give what made the shards, or extract features with this."
                )
        if theirs["autoencoder_digest"] != frozen["autoencoder"]:
            raise UserError(
                f"The latents of the shard set '{folder}' were made with another autoencoder (weights "
                f"{theirs['autoencoder_digest'][:8]}) than that of --model.prior '{prior.source}' (weights "
                f"{frozen['autoencoder'][:8]}). Give that prior, or extract features with this one."
            )


def check_control(folder: Path, source: str, unet: str, option: str) -> None:
    """Refuse a control that is not as it was written, or of another prior, whose shapes may well be the same.

    Args:
        folder: A model folder.
        source: The model's prior.
        unet: Digest of that prior's UNet.
        option: The option that named the folder, for errors.
    """
    check_sums(folder, option)
    theirs = read_index(folder, option).get("digests", {}).get("unet")
    if theirs != unet:
        raise UserError(
            f"{option}: the control in '{folder}' was trained with another prior (UNet {str(theirs)[:8]}) than "
            f"--model.prior '{source}' (UNet {unet[:8]}). Give that prior, or another control."
        )
