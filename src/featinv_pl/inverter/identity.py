"""Which inverter a file belongs to: checkpoints, model folders, scores and cached reconstructions."""

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
    """The settings of an inverter besides its frozen parts: the only list of these fields."""

    layer: str
    input_size: Side
    image_size: Side
    conditioning: Literal["spatial", "pooled"]
    hidden_channels: Annotated[int, Field(ge=1, le=100_000)]
    num_layers: NotRequired[Annotated[int, Field(ge=2, le=100)]]  # older folders lack it


def sampling(inverter: Any, precision: str) -> dict[str, Any]:
    """All else that determines a reconstruction, besides identity, sampler, feature map and key."""
    networks = (inverter.prior.unet, inverter.prior.autoencoder.vae, inverter.control.controlnet)
    return {
        "control": digest(inverter.control),
        "precision": precision,
        "seed": torch.initial_seed(),
        "version": version("featinv-pl"),
        "configurations": hashed([plain(network.config) for network in networks]),
    }


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """The fields in which two identities differ, for an error: `name: value there, value here`.

    A field that one of the two lacks is not compared: older files have fewer.

    Args:
        theirs: What a file says, which may be more than an identity.
        ours: The identity of the inverter at hand.
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
    """A hexadecimal digest of values for JSON."""
    return hashlib.blake2b(json.dumps(contents, sort_keys=True).encode(), digest_size=16).hexdigest()


def plain(config: Mapping[str, Any]) -> Any:
    """A configuration of diffusers as values for JSON, without its private fields."""
    public = {name: value for name, value in config.items() if not name.startswith("_")}
    return json.loads(json.dumps(public, default=str))
