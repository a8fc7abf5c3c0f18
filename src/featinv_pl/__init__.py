"""FeatInv on PyTorch Lightning: reconstruct images from a classifier's feature maps."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featinv_pl.inverter.inverter import Inverter
    from featinv_pl.inverter.pipeline import FeatInvPipeline
    from featinv_pl.nets.backbone import Backbone
    from featinv_pl.sampling.sampler import Sampler

    __version__: str

__all__ = ["Backbone", "FeatInvPipeline", "Inverter", "Sampler", "__version__"]

HOMES = {
    "Backbone": "nets.backbone",
    "FeatInvPipeline": "inverter.pipeline",
    "Inverter": "inverter.inverter",
    "Sampler": "sampling.sampler",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that the command starts fast."""
    if name == "__version__":
        from importlib.metadata import version

        return version("featinv-pl")
    if name not in HOMES:
        raise AttributeError(f"module 'featinv_pl' has no attribute '{name}'")
    return getattr(import_module(f"featinv_pl.{HOMES[name]}"), name)
