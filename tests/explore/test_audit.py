"""An audit accepts what is as close as the autoencoder, and finds the variance that was put in, and no other."""

import re
from dataclasses import replace
from itertools import combinations
from math import log2, pi
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from conftest import Pictures
from featinv_pl.__main__ import main
from featinv_pl.explore.audit import audit
from featinv_pl.explore.audited import MODEL, Audit, Audited
from featinv_pl.explore.variation import PARTS, deviations, regions
from featinv_pl.inverter.pipeline import FeatInvPipeline
from featinv_pl.nets.backbone import Backbone
from featinv_pl.sampling.sampler import Refinement
from interrupts import Capture

N, SIDE = 40, 32
X = torch.arange(SIDE) / SIDE


def variances(images: Tensor) -> dict[str, dict[str, float]]:
    """Of each part its share of the variance of pixels, and of each property its variance."""
    found = {key: values.nanmean().item() for key, values in deviations(images).items()}
    total = (images / 2).var(0).mean().item()
    result: dict[str, dict[str, float]] = {"property": {}}
    for (group, name), value in found.items():
        result.setdefault(group, {})[name] = value / total if group in PARTS else value
    assert all(sum(result[group].values()) == pytest.approx(1, abs=1e-5) for group in PARTS)
    return result


def test_a_wave_of_one_frequency() -> None:
    amounts = torch.randn(N) / 4
    found = variances((amounts[:, None] * torch.cos(2 * pi * 5 * X)).view(N, 1, 1, SIDE).expand(N, 3, SIDE, SIDE))
    assert found["frequency"]["4 to 8"] == pytest.approx(1)
    assert found["colour"]["luma"] == pytest.approx(1)
    assert found["property"]["brightness"] == pytest.approx(0, abs=1e-9)
    assert found["property"]["texture scale"] == pytest.approx(0, abs=1e-6)


def test_one_side() -> None:
    images = torch.zeros(N, 3, SIDE, SIDE)
    images[..., :10] = torch.randn(N, 3, SIDE, 10) / 8
    found = variances(images)
    assert sum(share for name, share in found["position"].items() if name.endswith("left")) == pytest.approx(1)
    mean = images[..., :16].numpy().mean((2, 3)) / 2
    assert found["property"]["left and right"] == pytest.approx(mean.var(0, ddof=1).sum(), rel=1e-4)
    assert found["property"]["brightness"] == pytest.approx((mean.mean(1) / 2).var(ddof=1), rel=1e-4)


def test_hue_alone() -> None:
    angles = 2 * pi * torch.arange(N) / N
    axes = torch.tensor([[1.0, -1, 0], [0.5, 0.5, -1]])
    colours = torch.stack([angles.cos(), angles.sin()], 1) @ (axes / axes.norm(dim=1, keepdim=True)) / 4
    found = variances(colours.view(N, 3, 1, 1).expand(N, 3, SIDE, SIDE))
    assert found["colour"]["chroma"] == pytest.approx(1)
    assert found["frequency"]["0"] == pytest.approx(1)
    assert found["property"]["hue"] == pytest.approx(N / (N - 1))  # all round the circle
    others = ("brightness", "background", "texture scale", "left and right")
    assert [found["property"][name] for name in others] == pytest.approx([0] * 4, abs=1e-9)
    grey = deviations(torch.rand(N, 1, SIDE, SIDE).expand(N, 3, SIDE, SIDE))
    assert grey["property", "hue"].isnan().all()


def test_border_and_texture() -> None:
    offsets = torch.randn(N, 3) / 8
    images = offsets.view(N, 3, 1, 1).expand(N, 3, SIDE, SIDE).clone()
    images[:, :, 4:-4, 4:-4] = 0
    assert variances(images)["property"]["background"] == pytest.approx((offsets / 2).var(0).sum().item(), rel=1e-4)
    cycles = [3 if number % 2 else 12 for number in range(N)]
    waves = torch.stack([torch.cos(2 * pi * number * X) for number in cycles]).view(N, 1, SIDE, 1)
    expected = np.var([log2(number) for number in cycles], ddof=1)
    assert variances(waves.expand(N, 3, SIDE, SIDE) / 2)["property"]["texture scale"] == pytest.approx(expected)


def test_regions_follow_the_picture() -> None:
    picture = np.zeros((SIDE, SIDE, 3), np.uint8)
    picture[:, 16:] = (250, 200, 30)
    variance = torch.zeros(SIDE, SIDE)
    variance[:, 16:] = 0.5
    labels, shares = regions(picture, variance)
    right = sorted({*labels[:, 18:].flat})
    assert shares.sum(0) == pytest.approx([1, 1])
    assert shares[right, 0].sum() == pytest.approx(1)
    assert shares[right, 1].sum() == pytest.approx(0.5, abs=0.05)


def audited(name: str, images: Tensor, fidelity: float = 0.9) -> Audited:
    means = {key: values.nanmean().item() for key, values in deviations(images).items()}
    said = {"picture": "1", "same": 1.0, "classes": {"1": N}, "cosine": 0.95, "autoencoder": 0.9, "extremes": ["1"] * 2}
    cosines = torch.linspace(0.9, 1, N)
    variance = (images / 2).var(0).mean(0)
    return Audited(name, images[:2], 0.9, fidelity, {"inverter": cosines}, images[:2], variance, means, {MODEL: said})


def test_open_is_relative_to_the_prior() -> None:
    """Half the spread leaves a quarter of the variance, and intervals are those of a bootstrap over images."""
    prior = torch.randn(N, 3, SIDE, SIDE) / 8
    factors = np.array([0.3, 0.4, 0.5, 0.6, 0.7])
    images = [audited(str(number), prior * float(factor)) for number, factor in enumerate(factors)]
    found = Audit(images, deviations(prior))
    rng = np.random.default_rng(0)
    free = deviations(prior)["colour", "luma"].numpy()
    resampled = [(rng.choice(factors, 5) ** 2).mean() / (rng.choice(free, N).mean() / free.mean()) for _ in range(4000)]
    for key, measure in found.measures.items():
        if key[1] not in ("hue", "texture scale"):  # which do not depend on the spread
            assert measure.open.values[0] == pytest.approx((factors**2).mean())
            assert measure.share.values[0] == pytest.approx(measure.free.values[0])
    facts = found.facts()["measures"]["colour"]["luma"]
    assert facts["interval"] == pytest.approx(np.percentile(resampled, [2.5, 97.5]).tolist(), rel=0.15)
    assert Audit(images[1:], deviations(prior)).facts()["measures"]["colour"]["luma"]["interval"] is None
    assert "Hardly" not in found.lead
    assert "infidelity" not in found.lead
    lower = Audit([audited("0", prior, 0.85)], deviations(prior))
    assert "The autoencoder's reconstructions reach 0.900 to 0.900: below that, part of the variance" in lower.lead


def test_no_accepted_sample_is_said() -> None:
    """The page has the rate, and the fidelity that would accept a tenth, and nothing about variance."""
    prior = torch.randn(N, 3, SIDE, SIDE) / 8
    none = replace(audited("4", prior), fidelity=1.5, extremes=prior[:0], variances={}, opinions={})
    found = Audit([none], deviations(prior))
    assert "Hardly any sample" in found.lead
    assert "A fidelity of 0.990 would accept a tenth" in found.lead
    assert "nothing can be said" in found.lead
    assert next(none.tiles()).caption == "4\nnone accepted\nbest 1.000"
    found.save(Path("out"))
    assert "What the classifier ignores" not in Path("out/audit.html").read_text()
    assert found.facts()["acceptance"]["inverter"] == {"accepted": 0, "best": 1, "tenth": pytest.approx(0.99)}


def test_accepted_are_as_close_as_the_autoencoder(
    pipeline: FeatInvPipeline, classifier_folder: Path, opened: Pictures
) -> None:
    others = {"same": Backbone(str(classifier_folder))}
    found = audit(pipeline, ["4", "7"], [*opened], 6, ("inverter", "refined"), others=others, seed=3)
    seen = pipeline.classify(pipeline.crop([*opened]))
    vae = pipeline.inverter.prior.autoencoder.vae
    for number, image in enumerate(found.images):
        target = seen["features"][number, None]
        with torch.no_grad():
            decoded = vae.decode(vae.encode(seen["images"][number, None]).latent_dist.mean).sample
        views = [pipeline.classify(decoded)]
        own = pipeline.inverter.sampler
        for place, sampler in enumerate((own, replace(own, refine=Refinement()))):  # the first seed is the prior's
            views.append(pipeline.classify(pipeline.reconstruct(target, 6, 4 + 2 * number + place, sampler)))
        cosines = [cosine_similarity(one["features"], target).mean((1, 2)) for one in views]
        assert image.ceiling == image.fidelity == pytest.approx(cosines[0].item(), abs=1e-5)
        torch.testing.assert_close(torch.cat([*image.cosines.values()]), torch.cat(cosines[1:]), rtol=0, atol=1e-5)
        kept = [one["images"][close >= image.fidelity] for one, close in zip(views[1:], cosines[1:], strict=True)]
        accepted = torch.cat(kept)
        assert 1 < image.accepted == len(accepted)
        apart = max((one - other).square().mean().sqrt() / 2 for one, other in combinations(accepted, 2))
        assert image.distance == pytest.approx(apart.item(), rel=1e-3)
        torch.testing.assert_close(image.variance, (accepted / 2).var(0).mean(0))
        assert image.opinions["same"].keys() == image.opinions[MODEL].keys()
        assert image.opinions["same"]["cosine"] == pytest.approx(image.opinions[MODEL]["cosine"], abs=1e-6)
        assert image.opinions["same"]["classes"] == image.opinions[MODEL]["classes"]
        assert sum(image.opinions["same"]["classes"].values()) == len(accepted)


def test_the_prior_does_not_depend_on_the_picture(pipeline: FeatInvPipeline, opened: Pictures) -> None:
    one, other = (audit(pipeline, ["it"], [picture], 3, fidelity=-1.0).prior for picture in opened)
    assert all(torch.equal(one[key].nan_to_num(), other[key].nan_to_num()) for key in one)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fidelity", "0.99999"], r"--fidelity: no sample reaches 0.99999. The best reach inverter 0\.9\d+;"),
        (["--num_samples", "1"], "--num_samples: how samples vary takes 2"),
        (["--others", "nothing"], "--others: 'nothing' is neither a folder"),
        (["--methods", "none"], "--methods: invalid choice: 'none'"),
    ],
)
def test_command_refuses(
    options: list[str], message: str, inverter_folder: Path, picture: Path, capsys: Capture
) -> None:
    with pytest.raises(SystemExit):
        main(["audit", str(picture), "--model", str(inverter_folder), "--out", "out", "--num_samples=2", *options])
    assert re.search(f"^featinv-pl: error: {message}", capsys.readouterr().err, re.MULTILINE)
    assert not Path("out").exists()
