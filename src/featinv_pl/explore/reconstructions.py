"""One picture and several reconstructions, for notebooks and the app; `reconstruct` writes those of many pictures."""

from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch.nn.functional import cosine_similarity

from featinv_pl.explore.exploration import Exploration, classify, reconstruct_maps, tile
from featinv_pl.explore.reconstruct import fidelity
from featinv_pl.inverter.outputs import as_picture
from featinv_pl.inverter.pipeline import FeatInvPipeline
from featinv_pl.pages.page import Section, Tile, prediction, top_classes


@dataclass(frozen=True)
class Reconstructions(Exploration):
    """Reconstructions of one picture, what they keep of its map, and where they differ."""

    name, title = "reconstructions", "Reconstructions"

    @property
    def cosines(self) -> list[float]:
        """Of the reconstructions' maps with the picture's, averaged over locations."""
        return cosine_similarity(self.found["features"][0], self.originals["features"]).mean((1, 2)).tolist()

    @property
    def lead(self) -> str:
        mean = sum(self.cosines) / len(self.cosines)
        return (
            f"{len(self.cosines)} images drawn from the picture's feature map, each from other noise. Below each: the "
            f"cosine of its map with the picture's ({mean:.3f} on average) and the predicted class, in a dashed "
            "frame where that is not the picture's."
        )

    def _measured(self) -> tuple[list[Tile], dict[str, Any]]:
        shown = as_picture(self.originals["images"][0])
        return fidelity(shown, self.originals["features"], self.found["images"][0], self.found["features"][0])

    def sections(self) -> list[Section]:
        [picture], [expected] = self.originals["images"], self.originals["logits"]
        samples = zip(self.found["images"][0], self.found["logits"][0], self.cosines, strict=True)
        drawn = [tile(image, logits, f"cosine {one:.3f}", expected=expected) for image, logits, one in samples]
        heats, _ = self._measured()
        text = "Where reconstructions lose the feature map, and, of several, where their pixels vary."
        return [
            Section("Picture and reconstructions", rows=[[tile(picture, expected, "the picture"), *drawn]]),
            Section("Where they differ", text, [heats]),
        ]

    def facts(self) -> dict[str, Any]:
        samples = [
            {"cosine": one, "prediction": prediction(logits), "classes": top_classes(logits)}
            for one, logits in zip(self.cosines, self.found["logits"][0], strict=True)
        ]
        return {"prediction": prediction(self.originals["logits"][0]), "samples": samples, **self._measured()[1]}


def reconstructions(
    pipeline: FeatInvPipeline, picture: Image.Image, num_samples: int = 4, seed: int = 0
) -> Reconstructions:
    """Reconstruct a picture of any size from several noises."""
    original = classify(pipeline, [picture])
    return Reconstructions(original, reconstruct_maps(pipeline, original["features"], num_samples, seed))
