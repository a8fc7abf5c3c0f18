"""What an inversion is and how it samples: one list of fields for all files that belong to a model.

Checkpoints, model folders, scores and stored reconstructions are told apart by it. `inversion` is a `FeatureInversion`.
"""

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import Annotated, Any, Literal, NotRequired

import torch
from pydantic import Field
from typing_extensions import TypedDict  # that of Python 3.11 is too old for pydantic

from featinv_pl.nets.frozen import digest

Side = Annotated[int, Field(ge=8, le=4096)]  # of an image, in pixels


class Settings(TypedDict):
    """The arguments that decide what a model is, besides its frozen parts. A model folder is loaded with them."""

    layer: str
    input_size: Side
    image_size: Side
    conditioning: Literal["spatial", "pooled"]
    hidden_channels: Annotated[int, Field(ge=1, le=100_000)]
    # Folders of before had no other null map, and no other number of layers.
    null_map: NotRequired[Literal["zeros", "learned"]]
    num_layers: NotRequired[Annotated[int, Field(ge=2, le=100)]]


def settings(inversion: Any) -> Settings:
    """Those of a model."""
    encoder = inversion.control.encoder
    return {
        "layer": inversion.backbone.layer,
        "input_size": inversion.backbone.input_size[0],
        "image_size": inversion.image_size,
        "conditioning": inversion.conditioning,
        "null_map": inversion.null_map,
        "hidden_channels": encoder.hidden_channels,
        "num_layers": encoder.num_layers,
    }


def identity(inversion: Any) -> dict[str, Any]:
    """What a trained control belongs to, as values that JSON can hold: settings, noise schedule, frozen weights."""
    prior = inversion.prior
    return {
        **settings(inversion),
        "feature_shape": list(inversion.backbone.feature_shape),
        "transform": inversion.backbone.transform_name,
        "scaling_factor": prior.autoencoder.scaling_factor,
        "schedule": _plain(prior.schedule.config),
        **inversion.frozen,
    }


def sampling(inversion: Any) -> dict[str, Any]:
    """All else that decides, with a sampler, which image is sampled from a feature map and a key."""
    networks = (inversion.prior.unet, inversion.prior.autoencoder.vae, inversion.control.controlnet)
    return {
        "control": digest(inversion.control),
        "precision": str(inversion.trainer.precision),
        "seed": torch.initial_seed(),
        "version": version("featinv-pl"),
        "configurations": hashed([_plain(network.config) for network in networks]),
    }


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Where two identities differ, for an error: `name: value there, value here`.

    A field that one of the two lacks is not compared: files of older versions have fewer.

    Args:
        theirs: What a file says, which may be more than an identity.
        ours: The identity of the model at hand.
    """
    found = []
    for name, value in ours.items():
        other = theirs.get(name, value)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            found += [f"{name}.{line}" for line in differences(other, value)]
        elif other != value:
            found.append(f"{name}: {str(other)[:60]} there, {str(value)[:60]} here")
    return found


def hashed(contents: Any) -> str:
    """A hexadecimal digest of values that JSON can hold."""
    return hashlib.blake2b(json.dumps(contents, sort_keys=True).encode(), digest_size=16).hexdigest()


def _plain(config: Mapping[str, Any]) -> Any:
    """A configuration of diffusers as values that JSON can hold, but for where and by what it was written."""
    public = {name: value for name, value in config.items() if not name.startswith("_")}
    return json.loads(json.dumps(public, default=str))
