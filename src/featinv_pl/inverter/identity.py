"""Which inverter a file belongs to: shards, checkpoints, controls, scores and cached reconstructions.

`option` is the option that named the file, for errors.
"""

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from featinv_pl.errors import UserError
from featinv_pl.inverter.inverter import Inverter, plain
from featinv_pl.nets.frozen import digest
from featinv_pl.nets.hub import check_sums, read_index
from featinv_pl.nets.weights import fill
from featinv_pl.types import Provenance

IDENTITY = "inversion"  # the entry of a checkpoint that holds the identity of its inverter


def sampling(inverter: Inverter, precision: str) -> dict[str, Any]:
    """All else that determines a reconstruction, besides identity, sampler, feature map and key."""
    networks = (inverter.prior.unet, inverter.prior.autoencoder.vae, inverter.control.controlnet)
    return {
        "control": digest(inverter.control),
        "preview": digest(inverter.preview) if inverter.preview else None,
        "previews": inverter.previews,
        "precision": precision,
        "seed": torch.initial_seed(),
        "version": version("featinv-pl"),
        "configurations": hashed([plain(network.config) for network in networks]),
    }


def hashed(contents: Any) -> str:
    """A hexadecimal digest of values for JSON."""
    return hashlib.blake2b(json.dumps(contents, sort_keys=True).encode(), digest_size=16).hexdigest()


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """The fields in which a file, which may lack some, differs from an identity: `name: value there, value here`."""
    found = []
    for name, value in ours.items():
        other = theirs.get(name, value)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            found += [f"{name}.{line}" for line in differences(other, value)]
        elif other != value:
            found.append(f"{name}: {str(other)[:60]} there, {str(value)[:60]} here")
    return found


def check_shards(manifests: Mapping[Any, Mapping[str, Any]], inverter: Inverter) -> None:
    """Refuse shard sets, given by folder, that other frozen parts have made, naming both sides."""
    classifier, digests = inverter.classifier, inverter.digests
    for folder, manifest in manifests.items():
        theirs: Provenance = manifest["provenance"]
        for option, made_with, ours in (
            ("backbone", theirs["backbone_digest"], digests["backbone"]),
            ("layer", theirs["layer"], classifier.layer),
            ("input_size", theirs["transform"], classifier.transform_name),
            ("image_size", theirs["image_size"], inverter.image_size),
            ("prior", theirs["autoencoder_digest"], digests["autoencoder"]),
        ):
            if made_with != ours:
                raise UserError(
                    f"`model.{option}`: the shard set '{folder}' of '{theirs['backbone']}' (maps of "
                    f"{tuple(theirs['feature_shape'])}) was made with '{made_with}', and this model of "
                    f"'{classifier.name}' (maps of {classifier.feature_shape}) has '{ours}'. "
                    "Give what made the shards, or extract features with this."
                )


def check_control(folder: Path, inverter: Inverter, option: str) -> None:
    """Refuse a model folder whose control is not as it was written, or of another prior, maybe of the same shapes."""
    check_sums(folder, option)
    theirs, ours = read_index(folder, option).get("digests", {}).get("unet"), inverter.digests["unet"]
    if theirs != ours:
        raise UserError(
            f"{option}: the control in '{folder}' was trained with another prior (UNet {str(theirs)[:8]}) than "
            f"`prior` '{inverter.prior.source}' (UNet {ours[:8]}). Give that prior, or another control."
        )


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
    """Load the weights of a control, strictly; the inverter is left as it was if anything is wrong."""
    return fill(inverter.control, control_weights(state_dict), "control", option)


def control_weights(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of a checkpoint by their names in the control, without the regression that only training needs."""
    kept = {name: value for name, value in state_dict.items() if not name.startswith("regression.")}
    return {name.removeprefix("control."): value for name, value in kept.items()}
