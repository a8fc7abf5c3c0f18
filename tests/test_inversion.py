"""The method: one training step, both conditionings, and what a checkpoint holds."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from conftest import MakeBatch
from featinv_pl.errors import UserError
from featinv_pl.inversion import FeatureInversion
from featinv_pl.sampling.sampler import Sampler
from featinv_pl.types import Batch


@pytest.fixture
def make_model(classifier_folder: Path, prior_folder: Path) -> Any:
    def make(**options: Any) -> FeatureInversion:
        sampler = options.pop("sampler", Sampler("ddim", steps=2))
        return FeatureInversion(
            str(classifier_folder), str(prior_folder), hidden_channels=8, sampler=sampler, **options
        )

    return make


def fit(model: FeatureInversion, batch: Batch, folder: Path, steps: int = 3, **options: Any) -> Trainer:
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    loader: DataLoader[Any] = DataLoader([batch] * steps, batch_size=None)  # type: ignore[arg-type]
    trainer.fit(model, loader, **options)
    return trainer


def test_training_changes_the_control_and_nothing_else(make_model: Any, make_batch: MakeBatch, tmp_path: Path) -> None:
    model = make_model()
    frozen = dict(model.frozen)
    before = {name: value.clone() for name, value in model.control.state_dict().items()}
    fit(model, make_batch(4), tmp_path)
    del model.frozen
    assert model.frozen == frozen
    assert any(not torch.equal(value, before[name]) for name, value in model.control.state_dict().items())
    assert not model.prior.training
    assert not model.backbone.training


def test_training_learns_to_use_the_map(make_model: Any, make_batch: MakeBatch, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make_model(dropout=0.0, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2))
    batch = make_batch(8)
    losses: list[float] = []
    model.log = lambda name, value, **_: losses.append(value.item())
    fit(model, batch, tmp_path, steps=60)
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_each_rank_and_batch_draws_its_own_noise(make_model: Any, make_batch: MakeBatch) -> None:
    model, batch = make_model(), make_batch(4)
    model.log = lambda *_, **__: None
    losses = [model.training_step(batch, index).item() for index in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_pooled_conditioning_sees_only_the_mean(make_model: Any, make_batch: MakeBatch) -> None:
    features = make_batch(2)["features"]
    shuffled = features.flatten(2)[:, :, torch.randperm(16)].unflatten(2, (4, 4))
    pooled, spatial = make_model(conditioning="pooled"), make_model()
    torch.testing.assert_close(pooled.condition(features), pooled.condition(shuffled))
    assert pooled.condition(features).shape == features.shape
    assert torch.equal(spatial.condition(shuffled), shuffled)


def test_dropout_replaces_the_map_by_zeros(make_model: Any, make_batch: MakeBatch) -> None:
    model, batch = make_model(dropout=0.999999), make_batch(4)
    model.log = lambda *_, **__: None
    torch.nn.init.normal_(model.control.controlnet.controlnet_mid_block.weight)
    torch.nn.init.normal_(model.control.encoder.layers[-1].weight)
    other = {**batch, "features": torch.randn_like(batch["features"])}
    assert torch.equal(model.training_step(batch, 0), model.training_step(other, 0))


@pytest.mark.parametrize("guidance", ["text", "features"])
def test_guidance_drops_what_it_says(make_model: Any, make_batch: MakeBatch, guidance: Any) -> None:
    model = make_model(sampler=Sampler("ddim", steps=2, guidance_scale=2.0, guidance=guidance))
    torch.nn.init.normal_(model.control.controlnet.controlnet_mid_block.weight)
    torch.nn.init.normal_(model.control.encoder.layers[-1].weight)
    features, noise = make_batch(2)["features"], torch.randn(2, 4, 4, 4)
    plain = make_model(sampler=Sampler("ddim", steps=2, guidance_scale=1.0))
    plain.control.load_state_dict(model.control.state_dict())
    timestep = torch.tensor(500)
    guided = model.denoiser(features, noise)(noise, timestep)
    conditional = plain.denoiser(features, noise)(noise, timestep)
    if guidance == "text":  # both prompts of this prior are zeros, so dropping the prompt changes nothing
        torch.testing.assert_close(guided, conditional, atol=1e-5, rtol=1e-5)
    else:
        unconditional = plain.denoiser(torch.zeros_like(features), noise)(noise, timestep)
        torch.testing.assert_close(guided, 2 * conditional - unconditional, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(guided, conditional, atol=1e-3)


def test_reconstructions_do_not_depend_on_the_batch(make_model: Any, make_batch: MakeBatch) -> None:
    model, batch = make_model(), make_batch(4)
    torch.nn.init.normal_(model.control.encoder.layers[-1].weight)
    torch.nn.init.normal_(model.control.controlnet.controlnet_mid_block.weight)
    whole = model.validation_step(batch, 0)
    last: Any = {name: value[3:] for name, value in batch.items()}  # type: ignore[index]
    single = model.validation_step(last, 0)
    # One grey level of rounding is allowed: sums are ordered differently in batches of other sizes.
    torch.testing.assert_close(single["images"], whole["images"][3:], atol=2 / 255 + 1e-6, rtol=0)
    assert not torch.equal(whole["images"][0], whole["images"][1])


def test_scores_are_taken_from_byte_images(make_model: Any, make_batch: MakeBatch) -> None:
    outputs = make_model().validation_step(make_batch(2), 0)
    levels = (outputs["images"] + 1) * 127.5
    torch.testing.assert_close(levels, levels.round(), atol=1e-3, rtol=0)
    assert outputs["features"].shape == outputs["ceiling"]["features"].shape == (2, 8, 4, 4)


def test_checkpoint_holds_the_trained_half_alone_and_loads(
    make_model: Any, make_batch: MakeBatch, tmp_path: Path
) -> None:
    model, batch = make_model(), make_batch(4)
    trainer = fit(model, batch, tmp_path)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert {name.split(".")[0] for name in checkpoint["state_dict"]} == {"control"}
    again = make_model()
    fit(again, batch, tmp_path, steps=3, ckpt_path=tmp_path / "a.ckpt")
    for name, value in model.control.state_dict().items():
        assert torch.equal(value, again.control.state_dict()[name])


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_loading_is_strict(make_model: Any, change: str) -> None:
    model = make_model()
    state = model.state_dict()
    if change == "missing":
        state.popitem()
    else:
        state["control.more"] = torch.zeros(1)
    with pytest.raises(UserError, match=r"--ckpt_path: 1 tensors of the control are missing, too many"):
        model.load_state_dict(state)


def test_checkpoint_of_another_conditioning_is_refused(make_model: Any, make_batch: MakeBatch, tmp_path: Path) -> None:
    fit(make_model(), make_batch(4), tmp_path).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="conditioning: spatial in the checkpoint, pooled here"):
        fit(make_model(conditioning="pooled"), make_batch(4), tmp_path, ckpt_path=tmp_path / "a.ckpt")


def test_dropout_of_one_is_refused(make_model: Any) -> None:
    with pytest.raises(UserError, match=r"--model\.dropout"):
        make_model(dropout=1.0)
