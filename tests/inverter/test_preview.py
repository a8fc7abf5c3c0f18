"""A preview decoder: what goes through it, and that scores of `test` do not."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader

from conftest import MakeBatch
from featinv_pl.__main__ import main
from featinv_pl.errors import UserError
from featinv_pl.inverter.inverter import Inverter
from featinv_pl.inverter.pipeline import FeatInvPipeline
from featinv_pl.nets.autoencoder import LatentAutoencoder
from featinv_pl.nets.backbone import Backbone
from featinv_pl.nets.control import Encoder
from featinv_pl.nets.frozen import products
from featinv_pl.nets.prior import Prior
from featinv_pl.sampling.sampler import Refinement
from featinv_pl.tasks.inversion import FeatureInversion
from featinv_pl.tasks.pretraining import TinyAutoencoder
from tiny import TRAINER, inversion, write

CONFIG: dict[str, Any] = {
    "encoder_block_out_channels": [4] * 4,
    "decoder_block_out_channels": [4] * 4,
    "num_encoder_blocks": [1] * 4,
    "num_decoder_blocks": [1] * 4,
}


@pytest.fixture
def tiny(prior_folder: Path, tmp_path: Path) -> Path:
    """A tiny autoencoder of the prior's latents, as fitting one writes it."""
    torch.manual_seed(0)
    TinyAutoencoder(str(prior_folder), CONFIG).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_gradients_go_through_it_and_reconstructions_do_not(
    classifier_folder: Path, prior_folder: Path, tiny: Path
) -> None:
    classifier, prior, preview = Backbone(str(classifier_folder)), Prior(str(prior_folder)), LatentAutoencoder
    inverter = Inverter(classifier, prior, Encoder(8), 32, preview=preview.load(str(tiny)))
    latents = torch.randn(2, *prior.latent_grid(32), requires_grad=True)
    decoded = AutoencoderTiny.from_pretrained(tiny).decode(latents).sample
    features = inverter.decoded_features(latents)
    torch.testing.assert_close(features, classifier(decoded)[0])
    assert torch.autograd.grad(features.sum(), latents)[0].abs().sum() > 0
    assert torch.equal(inverter.decode(latents), prior.autoencoder.decode(latents))
    inverter.previews = True
    torch.testing.assert_close(inverter.decode(latents), decoded)


def test_validation_within_fit_decodes_by_it_and_test_does_not(
    classifier_folder: Path, prior_folder: Path, shards: Path, tiny: Path
) -> None:
    settings = inversion(classifier_folder, prior_folder, shards)
    settings["trainer"]["logger"] = {"class_path": "CSVLogger", "init_args": {"save_dir": "logs"}}
    config = write(Path("run.yaml"), settings)
    main(["fit", "--config", config, f"--model.preview_decoder={tiny}"])
    main(["validate", "--config", config, f"--model.preview_decoder={tiny}", "--ckpt_path=last"])
    main(["validate", "--config", config, "--ckpt_path=last"])
    fitted, validated, plain = (
        ceiling(Path(f"logs/lightning_logs/version_{number}/metrics.csv")) for number in (0, 1, 2)
    )
    assert fitted != validated
    assert validated == plain
    main(["export", "run", "model"])
    pipeline = FeatInvPipeline.from_pretrained("model")
    preview_of_model = pipeline.inverter.preview
    assert preview_of_model is not None
    for name, value in AutoencoderTiny.from_pretrained(tiny).state_dict().items():
        assert torch.equal(preview_of_model.vae.state_dict()[name], value)
    pipeline.to(torch.bfloat16).with_sampler(steps=2, refine=Refinement(1))
    assert {one.dtype for one in products(preview_of_model)} == {torch.bfloat16}
    assert pipeline.reconstruct(torch.rand(pipeline.inverter.classifier.feature_shape)).isfinite().all()


def test_an_interrupted_fit_leaves_no_preview_behind(
    classifier_folder: Path, prior_folder: Path, tiny: Path, make_batch: MakeBatch
) -> None:
    class Interrupted(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            raise RuntimeError("stopped")

    options: dict[str, Any] = {"encoder": Encoder(8), "image_size": 32, "preview_decoder": str(tiny)}
    model = FeatureInversion(str(classifier_folder), str(prior_folder), **options)
    batches: DataLoader[Any] = DataLoader([make_batch(2)], batch_size=None)  # type: ignore[arg-type]
    trainer: dict[str, Any] = {**TRAINER, "max_steps": 1, "enable_checkpointing": False, "enable_progress_bar": False}
    with pytest.raises(RuntimeError, match="stopped"):
        Trainer(**trainer, callbacks=[Interrupted()]).fit(model, batches)
    assert model.inverter.previews
    Trainer(**trainer).test(model, batches, verbose=False)
    assert not model.inverter.previews


def ceiling(path: Path) -> float:
    """The logged cosine of the images that the autoencoder alone decodes."""
    with path.open(newline="") as file:
        return next(float(row["val/cosine.ceiling"]) for row in csv.DictReader(file) if row["val/cosine.ceiling"])


def test_a_decoder_of_other_latents_is_refused(classifier_folder: Path, prior_folder: Path, tmp_path: Path) -> None:
    AutoencoderTiny(**CONFIG, latent_channels=16).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"^`preview_decoder`: its latents have 16 channels at 1/8 .* prior's 4 at 1/8"):
        FeatureInversion(str(classifier_folder), str(prior_folder), preview_decoder=str(tmp_path / "other"))
    with pytest.raises(UserError, match=r"^`config`: its latents have 4 channels at 1/4"):
        TinyAutoencoder(str(prior_folder), {name: value[:3] for name, value in CONFIG.items()})
