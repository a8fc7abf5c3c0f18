"""FeatInv on PyTorch Lightning: reconstruct images from a classifier's feature maps."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featinv_pl.data.shards.datamodule import FeatureShards
    from featinv_pl.data.shards.reader import ShardSet
    from featinv_pl.inverter.inverter import Inverter
    from featinv_pl.inverter.pipeline import FeatInvPipeline
    from featinv_pl.nets.backbone import Backbone
    from featinv_pl.nets.control import Encoder
    from featinv_pl.nets.prior import Prior
    from featinv_pl.sampling.sampler import Sampler
    from featinv_pl.tasks.inversion import FeatureInversion

    __version__: str

__all__ = [
    "Backbone",
    "Encoder",
    "FeatInvPipeline",
    "FeatureInversion",
    "FeatureShards",
    "Inverter",
    "Prior",
    "Sampler",
    "ShardSet",
    "__version__",
]

HOMES = {
    "Backbone": "nets.backbone",
    "Encoder": "nets.control",
    "FeatInvPipeline": "inverter.pipeline",
    "FeatureInversion": "tasks.inversion",
    "FeatureShards": "data.shards.datamodule",
    "Inverter": "inverter.inverter",
    "Prior": "nets.prior",
    "Sampler": "sampling.sampler",
    "ShardSet": "data.shards.reader",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that the command starts fast."""
    if name == "__version__":
        from importlib.metadata import version

        return version("featinv-pl")
    if name not in HOMES:
        raise AttributeError(f"module 'featinv_pl' has no attribute '{name}'")
    return getattr(import_module(f"featinv_pl.{HOMES[name]}"), name)
