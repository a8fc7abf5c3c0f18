"""Stored reconstructions are reused by the same model alone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader

from conftest import MakeBatch
from featinv_pl.evaluation.drawn import DrawnImages
from featinv_pl.inverter.inverter import Inverter
from featinv_pl.nets.control import Encoder
from featinv_pl.sampling.sampler import Sampler
from featinv_pl.tasks.inversion import FeatureInversion
from tiny import TRAINER


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
    "image size": {"model": {"image_size": 64}},
    "conditioning": {"model": {"conditioning": "pooled"}},
    "input size": {"model": {"input_size": 64}},
    "sampler": {"model": {"sampler": Sampler(steps=2, guidance_scale=2.0)}},
    "seed": {"seed": 1},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_stored_reconstruction_is_reused_by_the_same_model_alone(
    change: str,
    classifier_folder: Path,
    prior_folder: Path,
    make_batch: MakeBatch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sampled: list[int] = []
    invert = Inverter.reconstruct_from

    def counted(self: Inverter, features: Tensor, noise: Tensor, sampler: Sampler | None = None) -> Tensor:
        sampled.append(len(features))
        return invert(self, features, noise, sampler)

    monkeypatch.setattr(Inverter, "reconstruct_from", counted)

    def test(prior: Path, precision: Any = "32-true", model: dict[str, Any] | None = None, seed: int = 0) -> int:
        torch.manual_seed(0)
        options = {"image_size": 32, "encoder": Encoder(8), "sampler": Sampler(steps=2), **(model or {})}
        inversion = FeatureInversion(str(classifier_folder), str(prior), **options)
        torch.manual_seed(seed)
        sampled.clear()
        trainer = Trainer(**TRAINER, precision=precision, default_root_dir="run", callbacks=[DrawnImages()])
        loader: Any = DataLoader(cast(Any, [make_batch(3)]), batch_size=None)
        trainer.test(inversion, loader, verbose=False)
        return sum(sampled)

    assert test(prior_folder) == 3
    other = Path(shutil.copytree(prior_folder, "prior"))  # a copy is the same prior
    changes = dict(CHANGES[change])
    changes.pop("prior", lambda _: None)(other)
    assert test(other, **changes) == (0 if change == "nothing" else 3)
