"""Adversarial images are near, are wrong, and belong to their keys."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from conftest import MakeBatch
from featinv_pl.attacks import Attack, attack
from featinv_pl.errors import UserError
from featinv_pl.extraction import AdversarialExtraction
from featinv_pl.types import ImageBatch


def brighter(images: Tensor) -> Tensor:
    """Class 1 for bright images, class 0 for dark ones."""
    mean = images.mean((1, 2, 3))
    return torch.stack([-mean, mean], dim=1) * 50


@pytest.mark.parametrize("labels", [[0, 0], [1, 1]])
def test_goes_as_far_as_it_may(labels: list[int]) -> None:
    images = torch.full((2, 3, 8, 8), 128 / 127.5 - 1)
    start = torch.rand(images.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    attacked = attack(brighter, images, torch.tensor(labels), start, Attack(4, 1.0, 20))
    assert brighter(attacked).argmax(1).tolist() == [1 - label for label in labels]
    change = ((attacked - images) * 127.5).round()
    assert change.abs().max() == 4
    assert (change.sign() == (1 if labels[0] == 0 else -1)).float().mean() > 0.99


def test_stays_within_bytes() -> None:
    images = torch.full((1, 3, 4, 4), 253 / 127.5 - 1)
    attacked = attack(brighter, images, torch.tensor([0]), torch.zeros_like(images), Attack(8, 2.0, 10))
    torch.testing.assert_close(attacked, torch.ones_like(images))


def test_extraction_attacks_the_backbone_itself(
    classifier_folder: Path, prior_folder: Path, make_batch: MakeBatch
) -> None:
    parts = {"backbone": str(classifier_folder), "autoencoder": str(prior_folder / "vae"), "image_size": 32}
    model = AdversarialExtraction(Attack(8, 2.0, 10), **parts)
    given = make_batch(6)
    with torch.inference_mode():  # as Lightning predicts
        before = model.backbone(given["images"])[1].argmax(1)
        labels = before.clone()
        labels[0] = -1  # without a label, it is attacked from what the backbone sees
        batch: ImageBatch = {
            "images": given["images"].clone(),
            "labels": torch.arange(6),  # the data's own numbers, which say nothing to the classifier
            "class_name": [str(label) if label >= 0 else "" for label in labels.tolist()],
            "source": given["source"],
            "key": given["key"],
            "view": [None] * 6,
            "unreadable": [""] * 6,
        }
        seen = model.predict_step(batch, 0)
        last: ImageBatch = {
            "images": batch["images"][5:],
            "labels": torch.zeros(1, dtype=torch.int64),
            "class_name": [str(int(labels[5]))],
            "source": batch["source"][5:],
            "key": batch["key"][5:],
            "view": [None],
            "unreadable": [""],
        }
        alone = model.predict_step(last, 0)
    other = AdversarialExtraction(Attack(4, 2.0, 10), **parts).provenance
    assert len({other["attack"], model.provenance["attack"], ""}) == 3  # sets of different attacks are not mixed up
    assert ((seen["images"] - given["images"]) * 127.5).abs().max() <= 8.001
    confidence = seen["logits"].softmax(1).gather(1, before[:, None])
    assert (confidence < model.backbone(given["images"])[1].softmax(1).gather(1, before[:, None])).all()
    assert torch.equal(seen["labels"], labels)
    # A grey level here and there: networks round differently in batches of other sizes.
    assert ((alone["images"] - seen["images"][5:]).abs() > 0).float().mean() < 0.01


def test_settings_are_checked() -> None:
    with pytest.raises(UserError, match=r"--model\.attack"):
        Attack(steps=0)
