"""Each kind of classifier, from images to reconstructions, by the public commands and in Python."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision import models

from classifiers import TINY, Net, saved
from featinv_pl.__main__ import main
from featinv_pl.errors import UserError
from featinv_pl.inverter.inverter import Inverter
from featinv_pl.inverter.pipeline import FeatInvPipeline
from featinv_pl.nets.backbone import Backbone
from featinv_pl.nets.control import Encoder
from featinv_pl.nets.frozen import digest
from featinv_pl.nets.prior import Prior
from featinv_pl.sampling.sampler import Sampler
from featinv_pl.tasks.inversion import FeatureInversion
from tiny import extraction, inversion, write

Options = dict[str, Any]


@pytest.fixture(autouse=True)
def leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATINV_IMPORTS", "classifiers")


def of_torchvision() -> Options:
    torch.save(models.get_model(TINY, weights=None, num_classes=10).state_dict(), "mine.pth")
    return {"backbone": f"torchvision/{TINY}", "weights": "mine.pth", "input_size": 64}


def of_transformers() -> Options:
    saved("vit")
    return {"backbone": "hf/model"}


def of_a_class_path() -> Options:
    torch.save(Net().state_dict(), "mine.pth")
    return {"backbone": "classifiers.Net", "weights": "mine.pth"}


def trained(classifier: Options, prior: Path) -> Path:
    """A checkpoint of a run of two steps, on features extracted with a classifier."""
    extract, train = extraction(Path(), prior, ["train"]), inversion(Path(), prior)
    for settings in (extract, train):
        settings["model"]["init_args"] |= classifier
    extract["trainer"]["limit_predict_batches"] = 1
    main(["predict", "--config", write(Path("extract.yaml"), extract)])
    train["data"]["init_args"] |= {"val": None, "test": {}}
    train["trainer"] |= {"val_check_interval": 1, "callbacks": train["trainer"]["callbacks"][:1]}
    main(["fit", "--config", write(Path("fit.yaml"), train)])
    [checkpoint] = Path("run").rglob("*.ckpt")
    return checkpoint


@pytest.mark.parametrize(
    ("make", "title", "layer"),
    [
        (of_torchvision, f"torchvision/{TINY}", "conv5"),
        (of_transformers, "ViTForImageClassification", "vit"),
        (of_a_class_path, "classifiers.Net", "net"),
    ],
)
def test_from_images_to_reconstructions(
    make: Callable[[], Options], title: str, layer: str, prior_folder: Path, picture: Path
) -> None:
    classifier = make()
    trained(classifier, prior_folder)
    manifest = json.loads(Path("shards/train/manifest.json").read_text())["provenance"]
    assert (manifest["backbone"], manifest["layer"]) == (classifier["backbone"], layer)
    main(["export", "run", "exported"])
    index = json.loads(Path("exported/model_index.json").read_text())
    assert (index["backbone"], index["layer"]) == (title, layer)
    assert index["digests"]["backbone"] == manifest["backbone_digest"]
    for path in (Path("mine.pth"), *Path("model").glob("*")):  # the folder has all that it needs
        path.unlink(missing_ok=True)
    main(["reconstruct", "--model", "exported", str(picture), "--out", "pictures"])
    assert any(Path("pictures").rglob("*.png"))


def test_a_class_path_needs_leave_again(prior_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inverter = Inverter(Backbone("classifiers.Net"), Prior(str(prior_folder)), Encoder(8), image_size=32)
    FeatInvPipeline(inverter).save_pretrained(Path("folder"))
    assert FeatInvPipeline.from_pretrained("folder").inverter.classifier.title == "classifiers.Net"
    monkeypatch.delenv("FEATINV_IMPORTS")
    with pytest.raises(UserError, match=r"not trusted: 'classifiers\.Net' would be imported and run"):
        FeatInvPipeline.from_pretrained("folder")
    given = FeatInvPipeline.from_pretrained("folder", classifier=inverter.classifier)
    assert given.inverter.classifier is inverter.classifier


def test_a_module_from_python(prior_folder: Path) -> None:
    net = Net()
    backbone = Backbone.from_module(net)
    sampler = Sampler(steps=2, guidance_scale=1.0)
    pipeline = FeatInvPipeline(Inverter(backbone, Prior(str(prior_folder)), Encoder(8), 32, sampler=sampler))
    pipeline.save_pretrained(Path("folder"))
    with pytest.raises(UserError, match=r"was a module in Python \(classifiers\.Net\).*classifier=Backbone\.from_mod"):
        FeatInvPipeline.from_pretrained("folder")
    same = Net()
    same.load_state_dict(net.state_dict())
    again = FeatInvPipeline.from_pretrained("folder", classifier=Backbone.from_module(same))
    features = torch.randn(backbone.feature_shape)
    assert torch.equal(again.reconstruct(features), pipeline.reconstruct(features))
    with pytest.raises(UserError, match=rf"`source`: the frozen parts .*backbone: {digest(net)[:60]} there"):
        FeatInvPipeline.from_pretrained("folder", classifier=Backbone.from_module(Net()))
    with pytest.raises(UserError, match=r"`source`: the frozen parts .*layer: net there, net\.1 here"):
        FeatInvPipeline.from_pretrained("folder", classifier=Backbone.from_module(same, layer="net.1"))


def test_a_checkpoint_is_loaded_with_a_module(prior_folder: Path) -> None:
    checkpoint = trained(of_a_class_path(), prior_folder)
    net = Net()
    net.load_state_dict(torch.load("mine.pth"))
    options: Options = {"prior": str(prior_folder), "image_size": 32, "encoder": Encoder(8)}
    loaded = FeatureInversion.load_from_checkpoint(checkpoint, backbone=Backbone.from_module(net), **options)
    assert loaded.inverter.classifier.model is net
    pipeline = FeatInvPipeline.from_pretrained(checkpoint, classifier=Backbone.from_module(net))
    assert pipeline.inverter.classifier.model is net
    with pytest.raises(UserError, match=r"belongs to another model \(backbone: "):
        FeatureInversion.load_from_checkpoint(checkpoint, backbone=Backbone.from_module(Net()), **options)
    with pytest.raises(UserError, match=r"belongs to another model \(backbone: "):
        FeatInvPipeline.from_pretrained(checkpoint, classifier=Backbone.from_module(Net()))
