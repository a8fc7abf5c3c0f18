"""The cache of reconstructions is exact, and the baselines depend on what determines them only."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from conftest import MakeBatch
from featinv_pl.evaluation.baselines import Floor
from featinv_pl.evaluation.reconstructions import ImageCache, Reconstructions
from featinv_pl.evaluation.regression import IDENTITY, _read
from featinv_pl.inverter.identity import sampling
from featinv_pl.inverter.inverter import Inverter
from featinv_pl.nets.backbone import Backbone
from featinv_pl.nets.control import Encoder
from featinv_pl.nets.prior import Prior
from featinv_pl.sampling.sampler import Sampler
from featinv_pl.types import Batch


@pytest.fixture
def make(classifier_folder: Path, prior_folder: Path) -> Callable[..., Inverter]:
    """An inverter whose control heeds the map."""

    def make(prior: Path = prior_folder, **options: Any) -> Inverter:
        classifier = Backbone(str(classifier_folder), input_size=options.pop("input_size", None))
        sampler = options.pop("sampler", Sampler(steps=2))
        inverter = Inverter(classifier, Prior(str(prior)), Encoder(8), **{"image_size": 32, **options}, sampler=sampler)
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
    "prediction type": {"prior": configured(SCHEDULE, prediction_type="v_prediction")},
    "scale of the latents": {"prior": configured("vae/config.json", scaling_factor=0.5)},
    "attention heads": {"prior": configured("unet/config.json", attention_head_dim=1)},
    "image size": {"image_size": 64},
    "conditioning": {"conditioning": "pooled"},
    "input size": {"input_size": 64},
    "sampler": {"sampler": Sampler(steps=2, guidance_scale=2.0)},
    "seed": {"seed": 1},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_stored_reconstruction_is_reused_by_the_same_model_only(
    change: str,
    make: Callable[..., Inverter],
    make_batch: MakeBatch,
    monkeypatch: pytest.MonkeyPatch,
    prior_folder: Path,
) -> None:
    sampled: list[int] = []
    reconstruct = Inverter.reconstruct_from

    def counted(self: Inverter, features: Tensor, noise: Tensor, sampler: Sampler) -> Tensor:
        sampled.append(len(features))
        return reconstruct(self, features, noise, sampler)

    monkeypatch.setattr(Inverter, "reconstruct_from", counted)

    def samples(prior: Path, precision: str = "32-true", seed: int = 0, **options: Any) -> int:
        inverter = make(prior, **options)
        torch.manual_seed(seed)
        sampled.clear()
        cache = ImageCache(Path("cache"), {**inverter.identity(), **sampling(inverter, precision)})
        Reconstructions(inverter, {}, cache=cache)(make_batch(3))
        return sum(sampled)

    assert samples(prior_folder) == 3
    other = Path(shutil.copytree(prior_folder, "prior"))  # a copy is the same prior
    changes = dict(CHANGES[change])
    changes.pop("prior", lambda _: None)(other)
    assert samples(other, **changes) == (0 if change == "nothing" else 3)


def test_reconstructions_are_bytes_and_do_not_depend_on_batch_or_cache(
    make: Callable[..., Inverter], make_batch: MakeBatch
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


def rows(batch: Batch, chosen: list[int]) -> Any:
    return {
        name: value[chosen] if isinstance(value, Tensor) else [value[row] for row in chosen]  # type: ignore[index]
        for name, value in batch.items()
    }


def test_the_floor_is_another_image_and_the_same_in_every_batch(make_batch: MakeBatch) -> None:
    batch: Any = make_batch(40)
    samples: Any = [{**{name: value[row] for name, value in batch.items()}, "labels": 0} for row in range(40)]
    floor = Floor(samples)
    partners = floor(batch)["images"]
    for row in range(40):
        assert not torch.equal(partners[row], batch["images"][row])
        assert torch.equal(floor(rows(batch, [row]))["images"][0], partners[row])


def test_a_regression_is_found_under_its_own_identity_only() -> None:
    path, weights = Path("regression.safetensors"), {"weight": torch.randn(3)}
    assert _read(path, "one") is None
    path.write_bytes(save(weights, {IDENTITY: "one"}))
    found = _read(path, "one")
    assert found is not None
    assert torch.equal(found["weight"], weights["weight"])
    assert _read(path, "other") is None
    path.write_bytes(path.read_bytes()[:-1])
    assert _read(path, "one") is None
