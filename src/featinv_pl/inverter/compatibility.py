"""Whether feature shards, checkpoints and trained controls belong to an inverter."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featinv_pl.errors import UserError
from featinv_pl.inverter.identity import differences
from featinv_pl.inverter.inverter import Inverter
from featinv_pl.nets.hub import check_sums, read_index
from featinv_pl.nets.weights import fill
from featinv_pl.types import Provenance

IDENTITY = "inversion"  # the entry of a checkpoint that holds the identity of its inverter


def check_shards(manifests: Mapping[Any, Mapping[str, Any]], inverter: Inverter) -> None:
    """Refuse shard sets that other frozen parts have made, naming both sides.

    Args:
        manifests: By folder.
        inverter: The inverter that reads the shards.
    """
    classifier, digests = inverter.classifier, inverter.digests
    for folder, manifest in manifests.items():
        theirs: Provenance = manifest["provenance"]
        shape = tuple(theirs["feature_shape"])
        if theirs["backbone_digest"] != digests["backbone"] or shape != classifier.feature_shape:
            raise UserError(
                f"The shard set '{folder}' was made with the backbone '{theirs['backbone']}' (maps of {shape}, "
                f"weights {theirs['backbone_digest'][:8]}); `backbone` is '{classifier.name}' (maps of "
                f"{classifier.feature_shape}, weights {digests['backbone'][:8]}). "
                "Give the backbone that made the shards, or extract features with this one."
            )
        for option, made_with, ours in (
            ("layer", theirs["layer"], classifier.layer),
            ("input_size", theirs["transform"], classifier.transform_name),
            ("image_size", theirs["image_size"], inverter.image_size),
        ):
            if made_with != ours:
                raise UserError(
                    f"`model.{option}`: the shard set '{folder}' was made with '{made_with}', and this model has "
                    f"'{ours}'. Give what made the shards, or extract features with this."
                )
        if theirs["autoencoder_digest"] != digests["autoencoder"]:
            raise UserError(
                f"The latents of the shard set '{folder}' were made with another autoencoder (weights "
                f"{theirs['autoencoder_digest'][:8]}) than that of `prior` '{inverter.prior.source}' (weights "
                f"{digests['autoencoder'][:8]}). Give that prior, or extract features with this one."
            )


def check_control(folder: Path, inverter: Inverter, option: str) -> None:
    """Refuse a control that is not as it was written, or of another prior, whose shapes may well be the same.

    Args:
        folder: A model folder.
        inverter: The inverter that loads the control.
        option: The option that named the folder, for errors.
    """
    check_sums(folder, option)
    theirs, ours = read_index(folder, option).get("digests", {}).get("unet"), inverter.digests["unet"]
    if theirs != ours:
        raise UserError(
            f"{option}: the control in '{folder}' was trained with another prior (UNet {str(theirs)[:8]}) than "
            f"`prior` '{inverter.prior.source}' (UNet {ours[:8]}). Give that prior, or another control."
        )


def load_control(inverter: Inverter, checkpoint: Mapping[str, Any], option: str) -> None:
    """Load the trained control of a checkpoint, strictly.

    Args:
        inverter: Is left as it was if anything is wrong.
        checkpoint: Of a run that fitted a `FeatureInversion`.
        option: The option that named the checkpoint, for errors.

    Raises:
        UserError: The checkpoint belongs to another model.
    """
    check_checkpoint(checkpoint, inverter, option)
    fill_control(inverter, checkpoint["state_dict"], option)


def check_checkpoint(checkpoint: Mapping[str, Any], inverter: Inverter, option: str) -> None:
    """Refuse the checkpoint of another model, naming the differences."""
    theirs = checkpoint.get(IDENTITY)
    if not isinstance(theirs, dict):
        raise UserError(f"{option}: the checkpoint is not one of a FeatureInversion.")
    if different := differences(theirs, inverter.identity()):
        raise UserError(
            f"{option}: the checkpoint belongs to another model ({'; '.join(different)}). "
            "Give the configuration that it was trained with."
        )


def fill_control(inverter: Inverter, state_dict: Mapping[str, Any], option: str) -> Any:
    """Load weights named `control.*`; a missing or unexpected one is an error."""
    weights = {name.removeprefix("control."): value for name, value in state_dict.items()}
    return fill(inverter.control, weights, "control", option)
