"""The cache of reconstructions is exact."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import MakeBatch
from featinv_pl.evaluation.reconstructions import ImageCache, Reconstructions
from featinv_pl.inverter.identity import sampling
from featinv_pl.inverter.inverter import Inverter
from featinv_pl.nets.backbone import Backbone
from featinv_pl.nets.control import Encoder
from featinv_pl.nets.prior import Prior
from featinv_pl.sampling.sampler import Sampler
from featinv_pl.types import Batch

Make = Callable[..., Inverter]


def rows(batch: Batch, chosen: list[int]) -> Any:
    return {
        name: value[chosen] if isinstance(value, Tensor) else [value[row] for row in chosen]  # type: ignore[index]
        for name, value in batch.items()
    }


@pytest.fixture
def make(classifier_folder: Path, prior_folder: Path) -> Make:
    """An inverter whose control heeds the map."""

    def make(prior: Path = prior_folder, input_size: int | None = None, **options: Any) -> Inverter:
        classifier = Backbone(str(classifier_folder), input_size=input_size)
        inverter = Inverter(
            classifier, Prior(str(prior)), Encoder(8), **{"image_size": 32, "sampler": Sampler(steps=2), **options}
        )
        torch.manual_seed(0)
        for weight in inverter.control.parameters():
            torch.nn.init.normal_(weight, std=0.3)
        return inverter

    return make


def prompts(prior: Path) -> None:
    file = prior / "prompts.safetensors"
    save_file({name: value + 0.1 for name, value in load_file(file).items()}, file)


def configured(file: str, **values: Any) -> Callable[[Path], None]:
    def change(prior: Path) -> None:
        path = prior / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


SCHEDULE = "scheduler/scheduler_config.json"
CHANGES: dict[str, Any] = {
    "nothing": {},
    "precision": {"precision": "bf16-mixed"},
    "prompts": {"prior": prompts},
    "schedule": {"prior": configured(SCHEDULE, beta_end=0.02)},
    "scale of the latents": {"prior": configured("vae/config.json", latents_mean=[0.0] * 4, latents_std=[2.0] * 4)},
    "attention heads": {"prior": configured("unet/config.json", attention_head_dim=1)},
    "conditioning": {"conditioning": "pooled"},
    "input size": {"input_size": 64},
    "sampler": {"sampler": Sampler(steps=2, guidance_scale=2.0)},
    "seed": {"seed": 1},
}


def test_a_reconstruction_is_found_by_the_same_model_only(
    make: Make, make_batch: MakeBatch, prior_folder: Path
) -> None:
    batch, found = make_batch(3), {}

    def names(prior: Path, precision: str = "32-true", seed: int = 0, **options: Any) -> list[str]:
        inverter = make(prior, **options)
        torch.manual_seed(seed)
        cache = ImageCache(Path("cache"), {**inverter.identity(), **sampling(inverter, precision)})
        once = cache.names(inverter.sampler, batch["key"], batch["features"])
        assert {*once}.isdisjoint(cache.names(inverter.sampler, batch["key"], batch["features"] + 0.1))
        assert cache.names(inverter.sampler, batch["key"], batch["features"].clone()) == once
        return once

    for number, (change, values) in enumerate(CHANGES.items()):
        other = Path(shutil.copytree(prior_folder, f"prior-{number}"))  # a copy is the same prior
        values.get("prior", lambda _: None)(other)
        found[change] = names(other, **{name: value for name, value in values.items() if name != "prior"})
    assert found["nothing"] == names(prior_folder)
    assert len({name for names in found.values() for name in names}) == 3 * len(CHANGES)


def test_ceilings_are_decoded_once(make: Make, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the validations of a training, whose decoder does not change."""
    inverter, batch = make(), make_batch(4)
    kept: dict[Any, Any] = {}
    plain = Reconstructions(inverter, {})._ceiling(batch)
    first = Reconstructions(inverter, {}, ceilings=kept)._ceiling(batch)
    monkeypatch.setattr(inverter, "decode", None)
    again = Reconstructions(inverter, {}, ceilings=kept)._ceiling(rows(batch, [2, 0]))
    assert torch.equal(plain["images"], first["images"])
    assert torch.equal(first["images"][[2, 0]], again["images"])
    torch.testing.assert_close(first["features"][[2, 0]], again["features"])


def test_reconstructions_do_not_depend_on_batch_or_cache(
    make: Make, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    inverter, batch = make(), make_batch(4)
    bare = {"bare": Sampler("ddim", steps=2, guidance_scale=1.0, control_scale=0.0)}
    before = copy.deepcopy(batch)
    made = Reconstructions(inverter, bare, num_samples=2)(batch)
    assert list(made) == ["inversion", "ceiling", "original", "bare"]
    assert batch.keys() == before.keys()
    assert torch.equal(batch["features"], before["features"])
    for method, one in made.items():
        levels = (one["images"] + 1) * 127.5
        torch.testing.assert_close(levels, levels.round(), atol=1e-3, rtol=0)
        assert one["features"].shape == (4, 8, 4, 4), method
    assert not torch.equal(made["bare"]["images"], made["inversion"]["images"])
    samples = made["inversion"]["sample_images"]
    assert torch.equal(samples[:, 0], made["inversion"]["images"])
    assert not torch.equal(samples[:, 1], samples[:, 0])

    cached = Reconstructions(inverter, bare, 2, cache=ImageCache(Path("cache"), {}))(rows(batch, [2, 3]))
    again = Reconstructions(inverter, bare, 2, cache=ImageCache(Path("cache"), {}))(batch)
    # One grey level of rounding is allowed: sums are ordered differently in batches of other sizes.
    for found in (cached["inversion"]["sample_images"], again["inversion"]["sample_images"][2:]):
        torch.testing.assert_close(found, samples[2:], atol=2 / 255 + 1e-6, rtol=0)
    monkeypatch.setattr(inverter, "reconstruct", None)  # all are stored now
    stored = Reconstructions(inverter, bare, 2, cache=ImageCache(Path("cache"), {}))(batch)
    assert torch.equal(stored["inversion"]["sample_images"], again["inversion"]["sample_images"])
