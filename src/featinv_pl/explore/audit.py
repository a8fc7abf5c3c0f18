"""An audit of a classifier: what stays open in images whose feature map is fixed."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count
from math import nan
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate
from tqdm import tqdm

from featinv_pl.bars import style
from featinv_pl.errors import UserError
from featinv_pl.explore.audited import MODEL, Audit, Audited, Method
from featinv_pl.explore.exploration import autoencode, classify, reconstruct_maps
from featinv_pl.explore.variation import deviations
from featinv_pl.inverter.pipeline import FeatInvPipeline
from featinv_pl.nets.backbone import Backbone
from featinv_pl.pages.page import prediction
from featinv_pl.sampling.sampler import Refinement, Sampler
from featinv_pl.types import Observation, predicted

AT_ONCE = 64  # images that another classifier reads
TRAINING_FREE = Refinement(steps=5, step_size=0.1, interval=(0.0, 1.0))


def audit(
    pipeline: FeatInvPipeline,
    names: Sequence[str],
    pictures: Sequence[Image.Image],
    num_samples: int = 64,
    methods: Sequence[Method] = ("inverter",),
    fidelity: float | None = None,
    others: Mapping[str, Backbone] | None = None,
    seed: int = 0,
) -> Audit:
    """Sample many images of each picture's map, and find out what those vary in whose map is as close as asked for.

    Closeness is the cosine of the maps, as far as the inverter reads them, averaged over locations. `fidelity` is the
    least one; None is that of the autoencoder's reconstruction of the picture. Every method makes `num_samples` of each
    map. As a control, as many samples of the bare prior are made. Each picture and method has noise of its own.

    Raises:
        UserError: No sample of any picture reaches the fidelity that was asked for.
    """
    if num_samples < 2:
        raise UserError(f"`num_samples`: how samples vary takes 2 of them at least, and {num_samples} was asked for.")
    own, seeds = pipeline.inverter.sampler, count(seed)
    bare = replace(own, control_scale=0.0, guidance_scale=1.0, refine=None, best_of=1)
    samplers: dict[Method, Sampler] = {
        "inverter": own,
        "refined": replace(own, refine=own.refine or Refinement()),
        "training-free": replace(bare, refine=TRAINING_FREE),
    }
    seen = classify(pipeline, pictures)
    free = reconstruct_maps(pipeline, seen["features"][:1], num_samples, next(seeds), bare)
    found = []
    for number, name in enumerate(tqdm(names, **style("audit", "picture"))):
        picture = _part(seen, slice(number, number + 1))
        samples = {
            method: _part(
                reconstruct_maps(pipeline, picture["features"], num_samples, next(seeds), samplers[method]), 0
            )
            for method in methods
        }
        decoded = autoencode(pipeline, picture["images"])
        found.append(_audited(pipeline, name, picture, decoded, samples, fidelity, others or {}))
    result = Audit(found, deviations(free["images"][0]))
    if fidelity is not None and not any(image.accepted for image in found):
        reached = [f"{method} {one['best']:.3f}" for method, one in result.acceptance.items()]
        raise UserError(
            f"`fidelity`: no sample reaches {fidelity:g}. The best reach {', '.join(reached)}; a tenth reach "
            f"{max(one['tenth'] for one in result.acceptance.values()):.3f}. Give at most that, or more `methods`."
        )
    return result


def _audited(
    pipeline: FeatInvPipeline,
    name: str,
    picture: Observation,
    decoded: Observation,
    samples: Mapping[Method, Observation],
    fidelity: float | None,
    others: Mapping[str, Backbone],
) -> Audited:
    target = pipeline.inverter.condition(picture["features"])

    def cosine(seen: Observation) -> Tensor:
        return cosine_similarity(pipeline.inverter.condition(seen["features"]), target).mean((1, 2))

    ceiling = cosine(decoded).item()
    least = ceiling if fidelity is None else fidelity
    cosines = {method: cosine(seen) for method, seen in samples.items()}
    kept = [_part(samples[method], cosines[method] >= least) for method in samples]
    accepted = cast(Observation, {key: torch.cat([cast(Any, one)[key] for one in kept]) for key in picture})
    images, number = accepted["images"], len(accepted["images"])
    flat = images.flatten(1)
    far = divmod(int(torch.cdist(flat, flat).argmax()), number) if number > 1 else range(number)
    opinions = {}
    if number:
        opinions[MODEL] = _opinion(picture, decoded, accepted, far)
        for other, classifier in others.items():
            one, two, three = (_seen_by(classifier, seen["images"]) for seen in (picture, decoded, accepted))
            opinions[other] = _opinion(one, two, three, far)
    shown = picture["images"]
    if shown.shape != decoded["images"].shape:
        shown = interpolate(shown, decoded["images"].shape[-2:], mode="bicubic", antialias=True).clamp(-1, 1)
    variance = (images / 2).var(0).mean(0) if number > 1 else images.new_full(images.shape[-2:], nan)
    variances = {key: values.nanmean().item() for key, values in deviations(images).items()} if number > 1 else {}
    both = torch.cat([shown, decoded["images"]])
    return Audited(name, both, ceiling, least, cosines, images[[*far]], variance, variances, opinions)


def _opinion(picture: Observation, decoded: Observation, accepted: Observation, far: Sequence[int]) -> dict[str, Any]:
    """What a classifier says of the accepted samples of a picture, of which two are `far` apart, as JSON."""
    classes = [prediction(logits) for logits in accepted["logits"]]
    cosines = [cosine_similarity(one["features"], picture["features"]).mean().item() for one in (accepted, decoded)]
    return {
        "picture": prediction(picture["logits"][0]),
        "same": (predicted(accepted["logits"]) == predicted(picture["logits"])).float().mean().item(),
        "classes": dict(Counter(classes).most_common()),
        "cosine": cosines[0],
        "autoencoder": cosines[1],
        "extremes": [classes[index] for index in far],
    }


def _seen_by(classifier: Backbone, images: Tensor) -> Observation:
    parts = [classifier.classify(part.to(classifier.mean.device)) for part in images.split(AT_ONCE)]
    return cast(Observation, {key: torch.cat([cast(Any, part)[key].cpu() for part in parts]) for key in parts[0]})


def _part(seen: Observation, index: Any) -> Observation:
    return {"images": seen["images"][index], "features": seen["features"][index], "logits": seen["logits"][index]}
