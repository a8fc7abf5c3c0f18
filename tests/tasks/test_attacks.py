"""Adversarial images are near, are wrong, and belong to their keys."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from art.attacks.evasion import AutoProjectedGradientDescent
from art.estimators.classification import PyTorchClassifier
from torch import Tensor
from torch.nn.functional import cross_entropy

from conftest import ROOT, MakeBatch
from featinv_pl.__main__ import main
from featinv_pl.data.images.digits import DigitImages
from featinv_pl.data.shards.reader import ShardSet
from featinv_pl.nets.backbone import Backbone
from featinv_pl.tasks.extraction import AdversarialExtraction, Attack, attack
from featinv_pl.tasks.pretraining import Classifier
from featinv_pl.types import from_uint8, to_uint8
from interrupts import Capture


def digits(source: str, number: int) -> tuple[Tensor, Tensor]:
    samples = [DigitImages(source)[index] for index in range(number)]
    images = from_uint8(torch.stack([sample.images for sample in samples]))
    return images, torch.tensor([sample.labels for sample in samples])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a classifier that knows digits, which takes some seconds."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    classifier = Classifier("test_resnet", 10, 32, {"output_stride": 8, "channels": [8, 8, 8, 8]})
    images, labels = digits("train", 600)
    optimizer = torch.optim.AdamW(classifier.model.parameters(), lr=1e-2)
    for _ in range(6):
        for rows in torch.randperm(600).split(50):
            optimizer.zero_grad()
            cross_entropy(classifier.model(images[rows]), labels[rows]).backward()
            optimizer.step()
    folder = tmp_path_factory.mktemp("trained")
    classifier.save_pretrained(folder)
    return folder


def test_extraction_attacks_the_backbone(classifier_folder: Path, prior_folder: Path, make_batch: MakeBatch) -> None:
    parts = {"backbone": str(classifier_folder), "autoencoder": str(prior_folder / "vae"), "image_size": 32}
    model = AdversarialExtraction(Attack(8, 2.0, 10), **parts)
    given = make_batch(6)
    with torch.inference_mode():  # as Lightning predicts
        before = model.backbone(given["images"])[1].argmax(1)
        labels = before.clone()
        labels[0] = -1  # without a label, it is attacked from what the backbone predicts
        batch: Any = {
            **{name: given[name] for name in ("images", "source", "key")},
            "labels": torch.arange(6),  # the data's own numbers, which say nothing to the classifier
            "class_name": [str(label) if label >= 0 else "" for label in labels.tolist()],
            "view": [None] * 6,
            "unreadable": [""] * 6,
        }
        attacked = model.predict_step(batch, 0)
        last: Any = {name: values[5:] for name, values in batch.items()}
        alone = model.predict_step(last, 0)
    other = AdversarialExtraction(Attack(4, 2.0, 10), **parts).provenance
    assert len({other["attack"], model.provenance["attack"], ""}) == 3  # sets of different attacks are not mixed up
    assert ((attacked["images"] - given["images"]) * 127.5).abs().max() <= 8.001
    confidence = attacked["logits"].softmax(1).gather(1, before[:, None])
    assert (confidence < model.backbone(given["images"])[1].softmax(1).gather(1, before[:, None])).all()
    assert torch.equal(attacked["labels"], labels)
    # A grey level here and there: networks round differently in batches of other sizes.
    assert ((alone["images"] - attacked["images"][5:]).abs() > 0).float().mean() < 0.01


def test_black_and_white_pixels_have_the_gradient_of_others(trained: Path) -> None:
    backbone = Backbone(str(trained))
    images, labels = digits("clean", 8)
    images = images.sign().requires_grad_()  # nothing else
    cross_entropy(backbone.logits(images), labels).backward()
    normalised = ((images.detach() + 1) / 2 - backbone.mean) / backbone.std
    normalised.requires_grad_()
    cross_entropy(backbone.model(normalised), labels).backward()
    assert images.grad is not None
    assert normalised.grad is not None
    torch.testing.assert_close(images.grad, normalised.grad / (2 * backbone.std))
    assert (images.grad != 0).float().mean() > 0.9


def losses(backbone: Backbone, images: Tensor, labels: Tensor) -> tuple[float, int]:
    """Mean loss, and how many are classified as labelled."""
    with torch.no_grad():
        logits = backbone.logits(images)
    return float(cross_entropy(logits, labels)), int((logits.argmax(1) == labels).sum())


def published_attack(backbone: Backbone, images: Tensor, labels: Tensor, settings: Attack) -> Tensor:
    """APGD of AutoAttack (Croce and Hein, arXiv 2003.01690) by another library, without our normalisation's clamp."""

    class Plain(torch.nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            logits: Tensor = backbone.model((pixels - backbone.mean) / backbone.std)
            return logits

    classifier = PyTorchClassifier(
        Plain(), torch.nn.CrossEntropyLoss(), images.shape[1:], backbone.num_classes, clip_values=(0, 1)
    )
    epsilon = settings.epsilon / 255
    apgd = AutoProjectedGradientDescent(
        classifier, eps=epsilon, eps_step=2 * epsilon, max_iter=settings.steps, nb_random_init=1, verbose=False
    )
    attacked = apgd.generate(((images + 1) / 2).numpy(), labels.numpy())
    return from_uint8(to_uint8(torch.from_numpy(attacked) * 2 - 1))


def test_attack_is_as_strong_as_a_published_one(trained: Path) -> None:
    backbone, (images, labels), settings = Backbone(str(trained)), digits("clean", 60), Attack(8, 2.0, 20)
    start = torch.rand(images.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ours = attack(backbone.logits, images, labels, start, settings)
    assert ((ours - images) * 127.5).abs().max() <= settings.epsilon + 1e-3
    assert ours.abs().max() == 1  # within bytes
    np.random.seed(0)
    theirs = published_attack(backbone, images, labels, settings)
    (clean_loss, clean), (our_loss, ours_right), (their_loss, theirs_right) = (
        losses(backbone, attacked, labels) for attacked in (images, ours, theirs)
    )
    assert theirs_right < clean
    assert ours_right <= theirs_right + 1
    assert our_loss - clean_loss > 0.9 * (their_loss - clean_loss)


def test_success_is_logged_and_stored(trained: Path, prior_folder: Path, capsys: Capture) -> None:
    config = ["--config", str(ROOT / "experiments/digits/adversarial.yaml"), "--data.batch_size=24"]
    config += ["--config", str(ROOT / "experiments/debug.yaml"), "--trainer.logger=false"]
    frozen = ["--model.backbone", str(trained), "--model.autoencoder", str(prior_folder / "vae")]
    main(["predict", *config, *frozen])
    (folder,) = {path.parent for path in Path("runs/demo/shards/adversarial").rglob("*.tar")}
    shards = ShardSet(folder, "adversarial", "")
    samples = [shards[number] for number in range(len(shards))]
    images, labels = digits("adversarial", 16)
    before = Backbone(str(trained)).logits(images).argmax(1)
    assert [sample["labels"] for sample in samples] == labels.tolist()
    right = [sample for sample, predicted in zip(samples, before, strict=True) if sample["labels"] == predicted]
    assert right == [sample for sample in samples if "fooled" in sample]
    assert all(sample["fooled"] == (int(sample["logits"].argmax()) != sample["labels"]) for sample in right)
    fooled = sum(sample["fooled"] for sample in right)
    assert fooled > 0
    printed = capsys.readouterr().err
    assert f"The attack succeeded on {fooled} of {len(right)} images" in printed
    assert "without a known label" not in printed
    settings = json.loads((trained / "config.json").read_text())
    (trained / "config.json").write_text(json.dumps({**settings, "label_names": [*"abcdefghij"]}))
    main(["predict", *config, *frozen, "--trainer.default_root_dir=unknown"])
    (trained / "config.json").write_text(json.dumps(settings))
    assert "Of 16 without a known label, the predicted class counts as correct." in capsys.readouterr().err
