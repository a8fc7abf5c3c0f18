"""Place by place: what reconstructions keep of a feature map, and what the map leaves open."""

from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity

from featinv_pl.pages.pictures import overlay
from featinv_pl.types import Observation


@dataclass(frozen=True)
class Fidelity:
    """Of one map and its reconstructions.

    Attributes:
        cosines: (h, w), between the map and those of its reconstructions at each location, mean over samples.
        spread: (H, W), the standard deviation over samples of pixels in [0, 1], root mean square over colours;
            None for a single sample.
    """

    cosines: Tensor
    spread: Tensor | None

    @classmethod
    def measure(cls, features: Tensor, samples: Observation) -> "Fidelity":
        """Compare a map with what was drawn from it.

        Args:
            features: (C, h, w).
            samples: (n, ...) reconstructions as the backbone sees them.
        """
        cosines = cosine_similarity(samples["features"], features.unsqueeze(0), dim=1).mean(0)
        pixels = (samples["images"] + 1) / 2
        spread = pixels.std(0).square().mean(0).sqrt() if len(pixels) > 1 else None
        return cls(cosines.cpu(), None if spread is None else spread.cpu())

    def tiles(self, picture: Image.Image) -> list[tuple[Image.Image, str, str]]:
        """The picture under heat maps, each with two lines of text: bright is lost, or left open."""
        low, high = self.cosines.min(), self.cosines.max()
        lost = (high - self.cosines) / (high - low).clamp(min=1e-6)
        tiles = [(overlay(picture, lost), "bright: lost", f"cosine {low:.3f} to {high:.3f}")]
        if self.spread is not None:
            top = self.spread.max()
            tiles.append((overlay(picture, self.spread / top.clamp(min=1e-6)), "bright: open", f"spread to {top:.3f}"))
        return tiles

    @property
    def facts(self) -> dict[str, Any]:
        """For JSON."""
        facts: dict[str, Any] = {"cosine_by_location": [[round(v, 4) for v in row] for row in self.cosines.tolist()]}
        if self.spread is not None:
            facts["pixel_spread"] = {
                "mean": round(self.spread.mean().item(), 4),
                "max": round(float(self.spread.max()), 4),
            }
        return facts
