"""The method: one training step, both conditionings, and what a checkpoint holds."""

import math
import re
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers import DDIMScheduler
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import cosine_similarity
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from conftest import MakeBatch
from featinv_pl.errors import UserError
from featinv_pl.inverter.inverter import Execution
from featinv_pl.inverter.pipeline import FeatInvPipeline
from featinv_pl.nets.control import Encoder
from featinv_pl.runtime.finite import FiniteGuard
from featinv_pl.runtime.progress import Progress, Speed
from featinv_pl.runtime.resuming import Resume
from featinv_pl.runtime.stopping import Stop
from featinv_pl.sampling.noise import Draws, generator
from featinv_pl.sampling.objective import Objective
from featinv_pl.sampling.sampler import Refinement, Sampler
from featinv_pl.sampling.solvers import Step
from featinv_pl.tasks.inversion import Adapt, FeatureInversion
from featinv_pl.tasks.pretraining import Classifier
from featinv_pl.types import Batch
from tiny import TRAINER

SMALL = Encoder(hidden_channels=8)
ALL_STEPS = {"guidance_every": 1, "control_every": 1}


@pytest.fixture
def make_model(classifier_folder: Path, prior_folder: Path) -> Any:
    def make(**options: Any) -> Any:
        options = {"encoder": SMALL, "sampler": Sampler("ddim", steps=2), **options}
        model: Any = FeatureInversion(str(classifier_folder), str(prior_folder), **options)
        model.logged = {}
        model.log = lambda name, value, **_: model.logged.update({name: value})
        return model

    return make


def awaken(model: Any) -> Any:
    """Let a control have a say before it is trained."""
    torch.nn.init.normal_(model.inverter.control.controlnet.controlnet_mid_block.weight)
    torch.nn.init.normal_(model.inverter.control.encoder.layers[-1].weight)
    return model


class Gradients(Callback):
    """Keeps the gradients as they are before they are clipped."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.seen = [one.grad.clone() for group in optimizer.param_groups for one in group["params"]]


def fit(model: FeatureInversion, batch: Batch, folder: Path, steps: int = 3, **settings: Any) -> Trainer:
    checkpoint = settings.pop("ckpt_path", None)
    options = {**TRAINER, "max_steps": steps, "default_root_dir": folder, "enable_progress_bar": False, **settings}
    trainer = Trainer(**options, enable_checkpointing=False)
    loader: DataLoader[Any] = DataLoader([batch] * steps, batch_size=None)  # type: ignore[arg-type]
    trainer.fit(model, loader, ckpt_path=checkpoint)
    return trainer


def test_training_changes_the_control_and_nothing_else(make_model: Any, make_batch: MakeBatch, tmp_path: Path) -> None:
    model = make_model()
    frozen = dict(model.inverter.digests)
    before = {name: value.clone() for name, value in model.inverter.control.state_dict().items()}
    trainer = fit(model, make_batch(4), tmp_path)
    del model.inverter.digests
    assert model.inverter.digests == frozen
    assert any(not torch.equal(value, before[name]) for name, value in model.inverter.control.state_dict().items())
    assert not model.inverter.prior.training
    assert not model.inverter.classifier.training
    assert [name for name, weight in model.named_parameters() if weight.grad is not None] == []  # given back

    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert {name.split(".")[0] for name in checkpoint["state_dict"]} == {"control", "regression"}
    again = make_model()
    fit(again, make_batch(4), tmp_path, ckpt_path=tmp_path / "a.ckpt")
    for name, value in model.inverter.control.state_dict().items():
        assert torch.equal(value, again.inverter.control.state_dict()[name])

    prior = again.inverter.prior
    prior.schedule = DDIMScheduler.from_config(prior.schedule.config, prediction_type="v_prediction")
    for other, change in (
        (make_model(conditioning="pooled"), "conditioning: spatial there, pooled here"),
        (again, "schedule.prediction_type: epsilon there, v_prediction here"),
    ):
        with pytest.raises(UserError, match=re.escape(f"another model ({change}")):
            fit(other, make_batch(4), tmp_path, ckpt_path=tmp_path / "a.ckpt")

    trained = [name for name in checkpoint["state_dict"] if name.startswith("regression.")]
    older = {**checkpoint, "state_dict": {k: v for k, v in checkpoint["state_dict"].items() if k not in trained}}
    torch.save(older, tmp_path / "older.ckpt")  # tested, but not trained further
    Trainer(**TRAINER, enable_checkpointing=False).test(
        make_model(), cast(Any, DataLoader)([make_batch(4)], batch_size=None), tmp_path / "older.ckpt", verbose=False
    )
    with pytest.raises(UserError, match=r"2 tensors of the regression are missing"):
        fit(make_model(), make_batch(4), tmp_path, ckpt_path=tmp_path / "older.ckpt")

    del checkpoint["optimizer_states"][0]["param_groups"][0]["params"][0]  # as where weights are divided otherwise
    torch.save(checkpoint, tmp_path / "others.ckpt")
    with pytest.raises(UserError, match=r"the optimizer in this checkpoint has (\d+) weights, and this run trains \d+"):
        fit(make_model(), make_batch(4), tmp_path, ckpt_path=tmp_path / "others.ckpt")

    missing, unexpected = model.state_dict(), {**model.state_dict(), "control.more": torch.zeros(1)}
    missing.popitem()
    for state in (missing, unexpected):
        with pytest.raises(
            UserError, match=r"`ckpt_path`: 1 tensors of the (control|regression) are missing, too many"
        ):
            model.load_state_dict(state)


def test_training_learns_to_use_the_map(make_model: Any, make_batch: MakeBatch, tmp_path: Path) -> None:
    torch.manual_seed(0)
    adam = partial(torch.optim.AdamW, lr=1e-2)
    model = make_model(objective=Objective(dropout=0.0), optimizer=adam)
    losses: list[float] = []
    model.log = lambda name, value, **_: losses.append(value.item())
    fit(model, make_batch(8), tmp_path, steps=40)
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_each_sample_draws_its_own_noise_wherever_it_is(make_model: Any, make_batch: MakeBatch) -> None:
    """So that the ranks together do what one alone would."""
    model, batch = make_model(), make_batch(4)

    def loss(rows: list[int], batch_idx: int = 0) -> float:
        whole: dict[str, Any] = dict(batch)
        part: Any = {name: [v[row] for row in rows] if isinstance(v, list) else v[rows] for name, v in whole.items()}
        return float(model.training_step(part, batch_idx).detach())

    assert loss([0, 1, 2, 3]) == loss([0, 1, 2, 3], 1)
    found = []
    model.log = lambda name, value, **_: found.append((name, value.compute().item()))
    for seed in range(2):  # the loss of validation is the same at every step
        torch.manual_seed(seed)
        model.validation_step(batch, seed)
        model.val_loss.reset()
    assert found[0] == found[1]
    assert found[0][0] == "val/loss"
    model = make_model()
    assert (loss([2, 0]) + loss([1, 3])) / 2 == pytest.approx(loss([0, 1, 2, 3]), abs=1e-6)
    same = {**batch, "features": batch["features"][[0] * 4], "moments": batch["moments"][[0] * 4]}
    first, second = (model.training_step({**same, "key": [key] * 4}, 0) for key in ("a", "b"))
    assert first != second


def test_a_step_takes_what_a_loader_has_drawn(make_model: Any, make_batch: MakeBatch) -> None:
    model, batch, seed = make_model(), make_batch(4), torch.initial_seed()
    whole = model.training_step(batch, 0).item()
    names, drawn = ("noise", "timesteps", "chances"), Draws(seed, 0, 1000)(batch["key"], (4, 4, 4))
    given: Any = dict(zip(names, drawn, strict=True)) | {"drawn": [seed, 0, 1000]}
    batch |= given  # as a loader hands it over
    assert model.training_step(batch, 0).item() == whole
    batch["noise"] = torch.zeros_like(batch["noise"])
    assert model.training_step(batch, 0).item() != whole
    batch["drawn"] = [seed + 1, 0, 1000]  # before a training was resumed that has another seed
    assert model.training_step(batch, 0).item() == whole


@pytest.mark.parametrize("option", ["activation_checkpointing", "channels_last"])
def test_savings_change_no_gradient(make_model: Any, make_batch: MakeBatch, option: str) -> None:
    def gradients(**options: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = awaken(make_model(**options))
        block = model.inverter.control.controlnet.down_blocks[0].resnets[0]
        block.register_forward_pre_hook(lambda *_: calls.append(option if options else ""))
        model.training_step(make_batch(4), 0).backward()
        named = model.inverter.control.named_parameters()
        return {name: weight.grad for name, weight in named if weight.grad is not None}

    calls: list[str] = []
    plain, saving = gradients(), gradients(execution=Execution(**{option: True}))
    torch.testing.assert_close(saving, plain)
    assert calls.count("") == 1
    assert calls.count(option) == 1 + (option == "activation_checkpointing")  # computed again when told


@pytest.mark.slow
def test_networks_are_compiled_twice(make_model: Any, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once with one batch size and once with any, for training, plain and guided sampling: not for each size."""
    whole = torch.nn.Module.compile  # all but the generation of code, which takes minutes
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: whole(self, backend="eager"))
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    torch._dynamo.reset()
    plain, compiled = awaken(make_model()), make_model(execution=Execution(compile=True))
    compiled.load_state_dict(plain.state_dict())
    guided, unguided = Sampler(steps=2), Sampler(steps=2, guidance_scale=1.0)
    counters = torch._dynamo.utils.counters["stats"]
    counters.clear()
    counts = []
    for size in (4, 3, 5):
        batch = make_batch(size)
        compiled.training_step(batch, 0).backward()
        for sampler in (guided, unguided):
            args = (batch["features"], batch["key"], 0, sampler)
            images, expected = (model.inverter.reconstruct(*args) for model in (compiled, plain))
            torch.testing.assert_close(images, expected, atol=1e-4, rtol=1e-4)
        counts.append(counters["unique_graphs"])
    assert counts[0] > 0
    assert counts[1] == counts[-1] <= 12  # two networks


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_mixed_precision_halves_the_prior(
    make_model: Any, make_batch: MakeBatch, tmp_path: Path, precision: str
) -> None:
    model = make_model()
    before = make_model().inverter.digests
    fit(model, make_batch(4), tmp_path, steps=1, precision=precision)
    half = precision == "bf16-mixed"
    assert model.inverter.prior.unet.conv_in.weight.dtype == (torch.bfloat16 if half else torch.float32)
    assert {weight.dtype for weight in model.inverter.control.parameters()} == {torch.float32}
    assert model.inverter.digests == before  # what shards and checkpoints are compared with


def test_pooled_conditioning_reads_only_the_mean(make_model: Any, make_batch: MakeBatch) -> None:
    sampler = Sampler("ddim", steps=2, guidance_scale=1.0, refine=Refinement(steps=1), best_of=2)
    pooled, features = make_model(conditioning="pooled", sampler=sampler).inverter, make_batch(2)["features"]
    shuffled = features.flatten(2)[:, :, torch.randperm(16)].unflatten(2, (4, 4))
    torch.testing.assert_close(pooled.condition(features), pooled.condition(shuffled))
    assert pooled.condition(features).shape == features.shape
    assert torch.equal(make_model().inverter.condition(shuffled), shuffled)
    one, other = (pooled.reconstruct(maps, ["a", "b"], 0, sampler) for maps in (features, shuffled))
    torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


def test_guidance_drops_what_it_says(make_model: Any, make_batch: MakeBatch) -> None:
    model = awaken(make_model())
    features, noise, step = make_batch(2)["features"], torch.randn(2, 4, 4, 4), Step(0, 500, torch.tensor(500))

    def predict(features: Tensor, prompt: Tensor) -> Any:
        encoded = model.inverter.control.encoder(features, noise.shape[-2:])
        return model.inverter.denoise(noise, step.timestep.expand(2), prompt.expand(2, -1, -1), encoded)

    prompt, empty, nothing = model.inverter.prior.prompt, model.inverter.prior.empty, torch.zeros_like(features)
    whole = predict(features, prompt)
    dropped: dict[Any, Tensor] = {"text": predict(features, empty), "features": predict(nothing, empty)}
    for guidance, without in dropped.items():
        sampler = Sampler("ddim", steps=2, guidance_scale=2.0, guidance=guidance)
        with torch.no_grad():
            guided = model.inverter.denoiser(features, noise, sampler)(noise, step)
            torch.testing.assert_close(guided, without + 2 * (whole - without), atol=1e-4, rtol=1e-4)
            assert not torch.allclose(guided, whole, atol=1e-3)
            sampler = replace(sampler, guidance_interval=(0.0, 0.4))
            torch.testing.assert_close(model.inverter.denoiser(features, noise, sampler)(noise, step), whole)


@pytest.mark.parametrize(
    ("changes", "latents", "control"),
    # How many latents of two maps go through the prior and through the control in four steps.
    [
        ({}, 4 * 4, 4 * 4),
        ({"guidance_scale": 1.0}, 4 * 2, 4 * 2),
        ({"guidance_every": 2}, 2 * 4 + 2 * 2, 2 * 4 + 2 * 2),
        ({"guidance_every": 2, "control_every": 2}, 2 * 4 + 2 * 2, 2 * 4),
        ({"guidance_every": 3, "control_every": 2}, 2 * 4 + 2 * 2, 4 + 2 + 4),
        ({"control_every": 3}, 4 * 4, 2 * 4),
        ({"guidance_interval": (0.0, 0.5), "control_every": 4}, 2 * 2 + 2 * 4, 2 + 4),
        ({"control_scale": 0.0, "control_every": 2}, 4 * 4, 0),
    ],
)
def test_branches_and_control_are_computed_as_often_as_is_said(
    make_model: Any, make_batch: MakeBatch, changes: Any, latents: int, control: int
) -> None:
    inverter, counts = awaken(make_model()).inverter, {"unet": 0, "controlnet": 0}
    features, noise, every = make_batch(2)["features"], torch.randn(2, 4, 4, 4), Sampler("ddim", 4)
    full = inverter.reconstruct_from(features, noise, replace(every, **{**changes, **ALL_STEPS}))
    for name, network in (("unet", inverter.prior.unet), ("controlnet", inverter.control.controlnet)):

        def count(_: Any, given: Any, name: str = name) -> None:
            counts[name] += len(given[0])

        network.register_forward_pre_hook(count)
    images = inverter.reconstruct_from(features, noise, replace(every, **changes))
    assert counts == {"unet": latents, "controlnet": control}
    assert torch.equal(images, full) == ((len(changes) < 2 and not {*ALL_STEPS} & {*changes}) or not control)
    alone = inverter.reconstruct_from(features[1:], noise[1:], replace(every, **changes))
    torch.testing.assert_close(alone, images[1:], atol=1e-3, rtol=1e-3)


class Copies(TorchDispatchMode):
    """Counts copies between the host and a device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            given = args[1] if func is torch.ops.aten.copy_.default else args[0]
            self.count += given.device != found.device
        return found


@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
def test_no_step_waits_for_a_device(
    make_model: Any, make_batch: MakeBatch, scheduler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # there is none for `meta`
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    inverter, counts = make_model().inverter.to("meta"), []  # whose tensors have no values that one could ask for
    features, noise = make_batch(2)["features"].to("meta"), torch.randn(2, 4, 4, 4, device="meta")
    for steps in (2, 4):
        sampler = Sampler(scheduler, steps, guidance_interval=(0.2, 0.8), refine=Refinement(steps=1))
        with Copies() as copies:
            inverter.reconstruct_from(features, noise, sampler)
        counts.append(copies.count)
    assert counts == [1, 1]  # the timesteps, all at once


def test_without_control_the_bare_prior_draws(make_model: Any, make_batch: MakeBatch) -> None:
    model, noise = awaken(make_model()), torch.randn(2, 4, 4, 4)
    bare = Sampler("ddim", steps=2, guidance_scale=1.0, control_scale=0.0)
    one, other = (model.inverter.reconstruct_from(make_batch(2, seed=seed)["features"], noise, bare) for seed in (0, 1))
    assert torch.equal(one, other)
    features = make_batch(2)["features"]
    controlled = model.inverter.reconstruct_from(features, noise, replace(bare, control_scale=1.0))
    half = model.inverter.reconstruct_from(features, noise, replace(bare, control_scale=0.5))
    assert not torch.allclose(controlled, one, atol=1e-2)
    assert 0 < (half - one).abs().mean() < (controlled - one).abs().mean()


@pytest.mark.parametrize("conditioning", ["spatial", "pooled"])
def test_refinement_needs_no_training(make_model: Any, conditioning: str) -> None:
    inverter = make_model(conditioning=conditioning).inverter
    bare = Sampler("ddim", steps=6, guidance_scale=1.0, control_scale=0.0)
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    target, noise = inverter.classifier.classify(images)["features"], torch.randn(4, 4, 4, 4)

    def cosines(sampler: Sampler) -> Tensor:
        maps = inverter.classifier.classify(inverter.reconstruct_from(target, noise, sampler))["features"]
        return cosine_similarity(inverter.condition(maps), inverter.condition(target)).mean((1, 2))

    gained = cosines(replace(bare, refine=Refinement(step_size=0.1, interval=(0, 1)))) - cosines(bare)
    assert (gained > 0).all()


def test_best_of_several_is_the_most_similar_for_each_map(make_model: Any, make_batch: MakeBatch) -> None:
    inverter, features, keys = make_model().inverter, make_batch(3)["features"], ["a", "b", "c"]
    sampler = Sampler("ddim", steps=2, guidance_scale=1.0)
    names = [keys, *([f"{key} candidate {number}" for key in keys] for number in (1, 2))]
    candidates = [inverter.reconstruct(features, one, 7, sampler) for one in names]
    maps = [inverter.classifier.classify(images)["features"] for images in candidates]
    best = torch.stack([cosine_similarity(one, features).mean((1, 2)) for one in maps]).argmax(0).tolist()
    expected = torch.stack([candidates[number][row] for row, number in enumerate(best)])
    torch.testing.assert_close(inverter.reconstruct(features, keys, 7, replace(sampler, best_of=3)), expected)


def test_the_objective_weighs_by_timestep_and_drops_maps(make_model: Any, make_batch: MakeBatch) -> None:
    model, batch = make_model(objective=Objective(weighting="none", regression=0.0)), make_batch(4)
    plain = model.training_step(batch, 0)
    model.objective = Objective(weighting="min-snr", regression=0.0)
    assert model.training_step(batch, 0) < plain
    model.objective = Objective(weighting="velocity", regression=0.0)
    assert model.training_step(batch, 0) > plain
    awaken(model).objective = Objective(dropout=0.999999)
    other = {**batch, "features": torch.randn_like(batch["features"])}
    assert torch.equal(model.training_step(batch, 0), model.training_step(other, 0))
    with pytest.raises(UserError, match=r"`objective\.dropout` cannot be"):
        Objective(dropout=1.0)


def test_the_regression_learns_mean_latents_where_there_is_a_map(make_model: Any, make_batch: MakeBatch) -> None:
    model, batch = awaken(make_model(objective=Objective(dropout=0.0, regression=2.0))), make_batch(4)
    both, logged = model.training_step(batch, 0), model.logged["train/regression"]
    encoder, prior = model.inverter.control.encoder, model.inverter.prior
    upsampled = functional.interpolate(batch["features"], (4, 4), mode="bilinear")
    read = model.regression(encoder.layers[:-1](upsampled))
    keys = [generator(torch.initial_seed(), model.current_epoch, key) for key in batch["key"]]
    noise = torch.stack([torch.randn(2, 4, 4, 4, generator=rng)[0] for rng in keys])
    torch.testing.assert_close(logged, functional.mse_loss(read, prior.autoencoder.sample(batch["moments"], noise)))
    model.objective = Objective(dropout=0.0, regression=1.0)
    alone = 2 * model.training_step(batch, 0) - both  # without it
    torch.testing.assert_close(both, alone + 2 * logged)
    model.objective = Objective(dropout=0.999999)
    model.training_step(batch, 0)
    assert model.logged["train/regression"] == 0
    assert {name.split(".")[0] for name in model.state_dict()} == {"control", "regression"}


def test_consistency_is_what_the_backbone_sees_at_little_noise(make_model: Any, make_batch: MakeBatch) -> None:
    model = awaken(make_model(objective=Objective(dropout=0.0, consistency=1.0, consistency_below=1.0)))
    batch, logged = make_batch(4), model.logged
    both = model.training_step(batch, 0)
    model.objective = Objective(dropout=0.0)
    torch.testing.assert_close(both, model.training_step(batch, 0) + logged["train/consistency"])
    assert 0 < logged["train/consistency"] < 2
    logged["train/consistency"].backward()
    assert model.inverter.control.controlnet.controlnet_mid_block.weight.grad.abs().max() > 0
    alone = []  # each sample by itself, from that with the least noise
    timesteps = Draws(torch.initial_seed(), 0, 1000)(batch["key"], (4, 4, 4))[1]
    model.objective = Objective(dropout=0.0, consistency=1.0, consistency_below=1.0)
    for row in timesteps.argsort().tolist():
        one: Any = {name: cast(Any, value)[row : row + 1] for name, value in batch.items()}
        model.training_step(one, 0)
        alone.append(logged["train/consistency"].item())
    least, *_, most = sorted(timesteps.tolist())
    for below, counted in ((1e-9, 0), ((least + 1) / 1000, 1), (most / 1000, 3), (1.0, 4)):
        model.objective = Objective(dropout=0.0, consistency=1.0, consistency_below=below)
        model.training_step(batch, 0)
        expected = sum(alone[: min(counted, math.ceil(4 * below))]) / 4  # at most as many as are expected in a batch
        assert logged["train/consistency"].item() == pytest.approx(expected, rel=1e-4)
    model.objective = Objective(dropout=0.999999, consistency=1.0, consistency_below=1.0)  # none has a map
    assert model.training_step(batch, 0).isfinite()
    assert logged["train/consistency"] == 0


class Reads(Callback, TorchDispatchMode):
    """Counts what is read from the device in a second and third step, which a GPU would be waited for."""

    found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        boolean = "index" in func._schema.name and any(one is not None and one.dtype == torch.bool for one in args[1])
        self.found += boolean or func._schema.name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero")
        return func(*args, **(kwargs or {}))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.__enter__()  # type: ignore[no-untyped-call]

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if args[-1] == 2:
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]


def test_a_step_waits_for_nothing(make_model: Any, make_batch: MakeBatch, tmp_path: Path) -> None:
    """Unless its loss is logged or shown."""
    model = make_model(objective=Objective(consistency=1.0), optimizer=partial(torch.optim.AdamW, fused=True))
    del model.log  # Lightning's own
    reads: Any = cast(Any, Reads)()
    others = [Progress(), Speed(), Resume(), FiniteGuard(), Stop()]
    fit(model, make_batch(4), tmp_path, 4, callbacks=[*others, reads], enable_progress_bar=True, gradient_clip_val=1.0)
    assert reads.found == 0


def test_encoder_alone_adapts_a_control(
    make_model: Any, make_batch: MakeBatch, prior_folder: Path, tmp_path: Path
) -> None:
    trained = awaken(make_model())
    FeatInvPipeline(trained.inverter).save_pretrained(tmp_path / "model")
    torch.manual_seed(4)
    wider = Classifier("test_resnet", 10, 32, {"output_stride": 8, "channels": [8, 8, 8, 12]})
    wider.save_pretrained(tmp_path / "wider")
    model: Any = FeatureInversion(
        str(tmp_path / "wider"), str(prior_folder), encoder=SMALL, adapt=Adapt(tmp_path / "model", "encoder")
    )
    first, last = (model.inverter.control.encoder.layers[number].weight for number in (0, -1))
    assert first.shape[1] == 12
    assert torch.equal(last, trained.inverter.control.encoder.layers[-1].weight)
    before = {name: value.clone() for name, value in model.inverter.control.state_dict().items()}
    fit(model, make_batch(4, shape=(12, 4, 4)), tmp_path)
    after = model.inverter.control.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {f"encoder.{name}" for name in model.inverter.control.encoder.state_dict()}

    torch.nn.init.normal_(trained.inverter.prior.unet.conv_in.weight)
    del trained.inverter.digests
    FeatInvPipeline(trained.inverter).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"`adapt\.control`: .* was trained with another prior"):
        make_model(adapt=Adapt(tmp_path / "other"))


def test_guidance_is_distilled_into_the_control(make_model: Any, make_batch: MakeBatch, tmp_path: Path) -> None:
    FeatInvPipeline(awaken(make_model()).inverter).save_pretrained(tmp_path / "model")
    objective = Objective(dropout=0.0, weighting="none", regression=0.0, distilled_guidance=3.0)
    model, batch, seen = make_model(adapt=Adapt(tmp_path / "model"), objective=objective), make_batch(4), []
    inverter, features, denoise = model.inverter, batch["features"], model.inverter.denoise

    def watched(*given: Any) -> Any:
        seen.append((*given[:2], denoise(*given)))
        return seen[-1][-1]

    inverter.denoise = watched
    loss = model.training_step(batch, 0)
    [(noisy, timesteps, prediction)] = seen
    for number, timestep in enumerate(timesteps.tolist()):
        one = slice(number, number + 1)
        guide = inverter.denoiser(features[one], noisy[one], Sampler("ddim", 2, guidance_scale=3.0))
        guided = guide(noisy[one], Step(0, timestep, timesteps[number]))
        loss = loss - (prediction[one] - guided).square().mean() / 4
    assert loss.abs() < 1e-3
    assert not any(name.startswith("teacher") for name in model.state_dict())

    before = {name: one.clone() for name, one in model.teacher.control.state_dict().items()}
    fit(model, batch, tmp_path)
    assert any(not torch.equal(one, before[name]) for name, one in inverter.control.state_dict().items())
    assert all(torch.equal(one, before[name]) for name, one in model.teacher.control.state_dict().items())
    for adapt in (None, Adapt(tmp_path / "model", "encoder")):
        with pytest.raises(UserError, match=r"`objective\.distilled_guidance` needs a trained control"):
            make_model(adapt=adapt, objective=objective)
    with pytest.raises(UserError, match=r"`objective\.distilled_guidance` cannot be 1\.0. Give a scale above 1"):
        Objective(distilled_guidance=1.0)


@pytest.mark.parametrize(("algorithm", "guards"), [("norm", []), ("norm", [FiniteGuard()]), ("value", [])])
def test_fused_gradients_are_clipped_in_bf16(
    make_model: Any, make_batch: MakeBatch, tmp_path: Path, algorithm: str, guards: list[Callback]
) -> None:
    """As torch clips them, after those of two batches are summed. What SGD keeps of a first step is its gradient."""
    bound, gradients = 1e-3, Gradients()
    model = make_model(optimizer=partial(torch.optim.SGD, lr=1e-3, momentum=0.9, fused=True))
    options = {"precision": "bf16-mixed", "accumulate_grad_batches": 2, "callbacks": [*guards, gradients]}
    clipping = {"gradient_clip_val": bound, "gradient_clip_algorithm": algorithm}
    trainer = fit(model, make_batch(4), tmp_path, steps=2, **options, **clipping, max_steps=1)
    [optimizer] = trainer.optimizers
    wanted = [torch.nn.Parameter(torch.zeros_like(one)) for one in gradients.seen]
    for parameter, gradient in zip(wanted, gradients.seen, strict=True):
        parameter.grad = gradient
    if algorithm == "norm":
        assert torch.nn.utils.clip_grad_norm_(wanted, bound) > bound
    else:
        torch.nn.utils.clip_grad_value_(wanted, bound)
    clipped = [optimizer.state[one]["momentum_buffer"] for group in optimizer.param_groups for one in group["params"]]
    torch.testing.assert_close(clipped, [parameter.grad for parameter in wanted])


def test_clipping_that_is_impossible_is_refused(make_model: Any, make_batch: MakeBatch, tmp_path: Path) -> None:
    model, other = (make_model(optimizer=partial(torch.optim.AdamW, fused=True)) for _ in range(2))
    with pytest.raises(UserError, match="in 16-mixed a fused AdamW unscales gradients only"):
        fit(model, make_batch(4), tmp_path, plugins=MixedPrecision("16-mixed", "cpu"), gradient_clip_val=1.0)
    with pytest.raises(UserError, match="`gradient_clip_val` must be at least 0, and is -1"):
        fit(other, make_batch(4), tmp_path, gradient_clip_val=-1.0)
