"""A backbone shows timm's own penultimate map and logits, whatever the layout of the model."""

import json
import re
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config
from timm.models import save_for_hf
from torch import Tensor
from torch.nn import functional

from featinv_pl.errors import UserError
from featinv_pl.nets.backbone import Backbone
from featinv_pl.nets.classifier_files import Classes
from featinv_pl.nets.frozen import digest

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


def save(folder: Path, name: str, size: tuple[int, int], **model_args: Any) -> Any:
    """Save a tiny timm model with weights and statistics of its own, and return it."""
    model = timm.create_model(name, num_classes=10, **model_args).eval()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data += 0.1 * torch.rand_like(tensor)
    config = {"input_size": (3, *size), "mean": MEAN, "std": STD, "interpolation": "bilinear", "crop_pct": 1.0}
    save_for_hf(model, str(folder), safe_serialization=True, data_config=config)
    return model


def normalise(images: Tensor) -> Tensor:
    """What the models above expect, for images in [-1, 1]."""
    return torch.stack([((images[:, n] + 1) / 2 - MEAN[n]) / STD[n] for n in range(3)], dim=1)


def some_images(*size: int) -> Tensor:
    return torch.rand(2, 3, *size) * 2 - 1


def channels_last(output: Tensor) -> Tensor:
    return output.permute(0, 3, 1, 2)


def tokens(before: int, height: int, width: int) -> Callable[[Tensor], Tensor]:
    """A grid of tokens in reading order, after some of other kinds."""
    return lambda output: output[:, before:].transpose(1, 2).reshape(len(output), -1, height, width)


SWIN = {"img_size": 32, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}


@pytest.mark.parametrize(
    ("name", "size", "model_args", "as_map"),
    [
        ("test_resnet", (64, 64), {"channels": [8, 8, 8, 12]}, Tensor.clone),
        ("test_efficientnet", (64, 96), {}, Tensor.clone),
        ("swin_tiny_patch4_window7_224", (32, 32), SWIN, channels_last),
        ("mambaout_femto", (32, 64), {"depths": [1, 1], "dims": [8, 16]}, channels_last),
        ("test_vit", (64, 32), {"img_size": (64, 32)}, tokens(1, 4, 2)),
        ("test_vit", (64, 64), {"img_size": 64, "reg_tokens": 8}, tokens(9, 4, 4)),
    ],
)
def test_map_and_logits_are_timms(
    name: str, size: tuple[int, int], model_args: dict[str, Any], as_map: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    model = save(tmp_path / "model", name, size, **model_args)
    backbone = Backbone(str(tmp_path / "model"))
    images = some_images(*size)
    features, logits = backbone(images)
    with torch.no_grad():
        expected, expected_logits = as_map(model.forward_features(normalise(images))), model(normalise(images))
    assert expected.std() > 1e-3
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-5, atol=1e-5)
    assert backbone.input_size == size
    assert backbone.feature_shape == features.shape[1:]
    assert backbone.num_classes == 10


def test_images_of_another_size_are_resized_as_the_model_says(tmp_path: Path) -> None:
    model = save(tmp_path / "model", "test_resnet", (64, 32), channels=[8, 8, 8, 8])
    images = some_images(80, 96)
    resized = functional.interpolate(images, (64, 32), mode="bilinear", antialias=True)
    _, logits = Backbone(str(tmp_path / "model"))(images)
    torch.testing.assert_close(logits, model(normalise(resized)), rtol=1e-4, atol=1e-4)


def test_gradients_reach_images_but_not_those_that_are_classified(classifier_folder: Path) -> None:
    backbone, images = Backbone(str(classifier_folder)), some_images(32, 32).requires_grad_()
    features, _ = backbone(images)
    features.square().sum().backward()
    assert images.grad is not None
    assert images.grad.abs().max() > 0
    assert not backbone.classify(images)["features"].requires_grad


def test_features_are_the_same_in_a_run_of_mixed_precision(classifier_folder: Path) -> None:
    backbone, images = Backbone(str(classifier_folder)), some_images(32, 32)
    expected = backbone(images)
    with torch.autocast("cpu", torch.bfloat16):
        seen = backbone(images)
    for one, other in zip(seen, expected, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


def test_looks_at_bytes(classifier_folder: Path) -> None:
    backbone = Backbone(str(classifier_folder))
    stored = torch.randint(0, 256, (2, 3, 32, 32)) / 127.5 - 1
    stored[0, 0, 0, 0], stored[0, 0, 0, 1] = 1, -1
    drawn = stored + (torch.rand_like(stored) - 0.5) * 0.98 / 127.5  # by less than half a step
    drawn[0, 0, 0, 0], drawn[0, 0, 0, 1] = 1.7, -1.7
    views = backbone.classify(drawn)
    features, logits = backbone(stored)
    torch.testing.assert_close(views["images"], stored, rtol=0, atol=1e-6)
    torch.testing.assert_close(views["features"], features, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(views["logits"], logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(views["features"], backbone(drawn)[0], rtol=1e-4, atol=1e-4)


def test_name_of_transform_tells_all_of_it(tmp_path: Path, classifier_folder: Path) -> None:
    save(tmp_path / "model", "test_resnet", (64, 32), channels=[8, 8, 8, 8])
    name = Backbone(str(tmp_path / "model")).transform_name
    assert all(part in name for part in ("bilinear", "64x32", "0.4", "0.6", "0.2", "0.3"))
    assert name != Backbone(str(classifier_folder)).transform_name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet5O", r"'resnet5O' is neither a folder nor a timm model\. Did you mean resnet50,"),
        ("qqqqzzzz", r"'qqqqzzzz' is neither a folder nor a timm model\. `timm\.list_models"),
        ("resnet18.nowhere", r"'resnet18\.nowhere' could not be loaded .*nowhere"),
        ("crossvit_tiny_240", r"the penultimate layer of 'crossvit_tiny_240' does not return a spatial map"),
    ],
)
def test_refuses_a_name(name: str, message: str) -> None:
    with pytest.raises(UserError, match=f"`backbone`.*{message}"):
        Backbone(name, "random")


# Layers, weights and sizes


@pytest.mark.parametrize(
    ("name", "size", "model_args", "layer", "index"),
    [
        ("test_resnet", (64, 64), {"channels": [8, 8, 8, 8]}, "layer2", 2),
        ("test_convnext", (64, 96), {}, "stages.1", 1),
        ("swin_tiny_patch4_window7_224", (32, 32), SWIN, "layers.0", 0),
        ("test_vit", (64, 32), {"img_size": (64, 32)}, "blocks.1", 1),
        ("test_vit", (64, 64), {"img_size": 64, "reg_tokens": 2}, "blocks.0", 0),
    ],
)
def test_any_layer_can_be_the_map(
    name: str, size: tuple[int, int], model_args: dict[str, Any], layer: str, index: int, tmp_path: Path
) -> None:
    model = save(tmp_path / "model", name, size, **model_args)
    backbone = Backbone(str(tmp_path / "model"), layer=layer)
    images = some_images(*size)
    features, logits = backbone(images)
    options = {"indices": [index], "norm": False, "output_fmt": "NCHW", "intermediates_only": True}
    [expected] = model.forward_intermediates(normalise(images), **options)
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, model(normalise(images)), rtol=1e-5, atol=1e-5)
    assert backbone.feature_shape == features.shape[1:]


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("layer5", r"'test_resnet' has no layer 'layer5'\. Did you mean layer"),
        ("qqqq", r"'test_resnet' has no layer 'qqqq'\. Did you mean .*layer4"),
        ("fc", r"'fc' of 'test_resnet' does not return a spatial map"),
    ],
)
def test_refuses_a_layer(layer: str, message: str) -> None:
    with pytest.raises(UserError, match=f"`layer`: {message}"):
        Backbone("test_resnet", "random", layer)


State = dict[str, Any]


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def robust(state: State) -> State:
    """As the robustness library saves: the network twice, and a normalisation with each."""
    both = {**prefixed("module.model.", state), **prefixed("module.attacker.model.", state)}
    return {"model": {"module.normalizer.new_mean": torch.zeros(3, 1, 1), **both}, "epoch": 90}


LAYOUTS: dict[str, Callable[[State], State]] = {
    "plain.bin": lambda state: state,
    "parallel.pth.tar": lambda state: {
        **{"state_dict": prefixed("module.", state), "best_acc1": np.float64(71.3), "arch": "test_resnet"},
        **{"optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}},
    },
    "lightning.ckpt": lambda state: {
        "state_dict": {**prefixed("model.", state), "loss.weight": torch.ones(10)},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(1.0), "scores": np.ones(3)}},
    },
    "robust.pt": robust,
    "tutorial.pth": lambda state: {"epoch": 1, "model_state_dict": prefixed("_orig_mod.", state), "loss": 0.1},
    "cifar.pth": lambda state: {"net": prefixed("module.", state), "acc": 95.0, "epoch": 200},
    "averaged.pth": lambda state: {"model": {name: value + 1 for name, value in state.items()}, "model_ema": state},
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("file", [*LAYOUTS, "plain.safetensors"])
def test_weights_from_a_file(file: str, legacy: bool) -> None:
    state = timm.create_model("test_resnet").state_dict()
    if file in LAYOUTS:
        torch.save(LAYOUTS[file](state), file, _use_new_zipfile_serialization=not legacy)
    else:
        save_file(state, file)
    model = Backbone("test_resnet", file).model
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert "state_dict" not in model.pretrained_cfg


def resnet(**options: Any) -> State:
    return dict(timm.create_model("test_resnet", **options).state_dict())


CONTENTS: dict[str, Callable[[], State]] = {
    "it has 10 classes, and 'test_resnet'": lambda: resnet(num_classes=10),
    r"it takes images with 1 channel\(s\)": lambda: resnet(in_chans=1),
    "its names are those of .* transformers": lambda: {"vit.encoder.layer.0.output.weight": torch.ones(1)},
    "two networks of the same names and other": lambda: {"model.a": torch.ones(1), "net.a": torch.zeros(1)},
    "does not hold the weights of 'test_resnet'": lambda: dict(timm.create_model("test_convnext").state_dict()),
}


@pytest.mark.parametrize("message", CONTENTS)
def test_says_why_weights_do_not_fit(message: str) -> None:
    torch.save(CONTENTS[message](), "weights.pth")
    with pytest.raises(UserError, match=f"`weights`: 'weights.pth' .*{message}"):
        Backbone("test_resnet", "weights.pth")


def test_a_folder_says_how_many_classes_a_file_has() -> None:
    torch.save(state := resnet(num_classes=10), "weights.pth")
    with pytest.raises(UserError) as refusal:
        Backbone("test_resnet", "weights.pth")
    Path("folder").mkdir()
    Path("folder/config.json").write_text(re.findall(r"such as (\{.*\}), and", str(refusal.value))[0])
    backbone = Backbone("folder", "weights.pth")
    assert (backbone.num_classes, backbone.input_size) == (10, (160, 160))
    assert all(torch.equal(value, state[name]) for name, value in backbone.model.state_dict().items())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, r"there is no file 'folder/config\.json'"),
        ({"architectures": ["ViTModel"]}, "'folder' .* does not name an architecture of timm"),
        ({"model_type": "vit"}, r"'folder' is not a model of images .* containing a preprocessor_config\.json"),
        ({"architecture": "test_resnet", "model_args": {"in_chans": 1}, "pretrained_cfg": {}}, "with 1 channel"),
    ],
)
def test_refuses_a_folder_of_another_kind(config: dict[str, Any] | None, message: str) -> None:
    Path("folder").mkdir()
    if config:
        Path("folder/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"`backbone`: .*{message}"):
        Backbone("folder", "random" if config else "pretrained")


@pytest.mark.parametrize(("name", "grid"), [("test_vit", 6), ("test_convnext", 3)])
def test_another_input_size(name: str, grid: int, tmp_path: Path) -> None:
    model = timm.create_model(name)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    backbone = Backbone(name, str(tmp_path / "weights.safetensors"), input_size=96)
    assert backbone.input_size == (96, 96)
    assert backbone.feature_shape[1:] == (grid, grid)
    assert torch.equal(backbone.model.get_classifier().weight, model.get_classifier().weight)


@pytest.mark.parametrize(("name", "input_size"), [("test_convnext", None), ("resnet18.a1_in1k", 288), ("test_vit", 96)])
def test_crops_pictures_as_timm_does_for_evaluation(name: str, input_size: int | None) -> None:
    backbone = Backbone(name, "random", input_size=input_size)
    picture = Image.effect_noise((301, 243), 90).convert("L")
    config = resolve_model_data_config(backbone.model) | {"input_size": (3, *backbone.input_size)}
    if input_size == 288:  # the size that this model is tested at
        config = resolve_model_data_config(backbone.model, use_test_size=True)
        assert config["crop_pct"] != resolve_model_data_config(backbone.model)["crop_pct"]
    expected = create_transform(**config)(picture.convert("RGB"))
    seen = backbone.transform(backbone.crop(picture)[None])[0]
    torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "settings", "classes"),
    [
        ("test_resnet", {}, 1000),
        ("test_resnet", {"num_classes": 0}, 0),
        ("test_resnet", {"num_classes": 512}, 512),
        ("fastvit_mci0.apple_mclip", {}, 0),  # 512 channels to compare with those of texts
    ],
)
def test_an_embedding_is_no_classes(name: str, settings: dict[str, Any], classes: int, tmp_path: Path) -> None:
    if settings:
        save_for_hf(timm.create_model(name, **settings), str(tmp_path), safe_serialization=True)
    backbone = Backbone(str(tmp_path) if settings else name, "pretrained" if settings else "random", input_size=64)
    assert backbone.num_classes == backbone(some_images(64, 64))[1].shape[1] == classes
    assert backbone.classifies == bool(classes)


def test_saved_backbone_is_the_same(tmp_path: Path) -> None:
    save(tmp_path / "model", "test_vit", (64, 64), img_size=64)
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "weights.safetensors")
    images = some_images(64, 64)
    of_file = Backbone("test_vit", str(tmp_path / "weights.safetensors"), input_size=64)
    for backbone in (Backbone(str(tmp_path / "model")), of_file):
        backbone.save_pretrained(tmp_path / "saved")
        again = Backbone(str(tmp_path / "saved"), input_size=64)
        for ours, theirs in zip(backbone(images), again(images), strict=True):
            assert torch.equal(ours, theirs)
        assert digest(again.model) == digest(backbone.model)
        assert again.title == backbone.title == "test_vit"


# Names of classes, against timm's own files

SYNSETS = {1000: "imagenet", 11221: "imagenet21k_miil", 11821: "imagenet12k", 21841: "imagenet22k"}
SYNSETS |= {21842: "imagenet22k_ms", 21843: "imagenet21k_goog"}


def head(num_classes: int) -> Classes:
    return Classes.of(None, num_classes)


@pytest.mark.parametrize("num_classes", SYNSETS)
def test_wnids_are_labelled_in_the_order_of_the_head(num_classes: int) -> None:
    lines = files("timm.data").joinpath(f"_info/{SYNSETS[num_classes]}_synsets.txt").read_text().splitlines()
    classes = head(num_classes)
    for label in (0, 217, num_classes - 1):
        assert classes.label(lines[label]) == label
    assert classes.label("n99999999") == classes.label("cat") == classes.label(str(num_classes)) == -1
    assert classes.label("217") == (217 if num_classes == 1000 else -1)  # the folders of ImageNet-V2


def test_other_heads_say_nothing_of_wnids() -> None:
    assert head(100).label("n01440764") == -1
    assert head(10).label("7") == 7


def test_names_of_a_configuration_decide(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", channels=(8, 8, 8, 8), num_classes=3)
    save_for_hf(model, str(tmp_path), {"label_names": ["n02102040", "owl", "0"]}, safe_serialization=True)
    backbone = Backbone(str(tmp_path), input_size=32)
    names = ("n02102040", "owl", "0", "1", "n01440764")
    assert [backbone.classes.label(name) for name in names] == [0, 1, 2, -1, -1]
    backbone.save_pretrained(tmp_path / "again")
    assert Backbone(str(tmp_path / "again"), input_size=32).classes == backbone.classes
    for wrong in (["a", "b"], ["a", "a", "b"], [1, 2, 3], "abc"):
        with pytest.raises(UserError, match=r"label_names in config\.json are not 3 different names"):
            Classes.of(wrong, 3, backbone.network.names_from)
