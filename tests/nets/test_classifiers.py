"""Classifiers of torchvision, of transformers and of one's own: numbers of their own libraries, and what is refused."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from socketserver import BaseRequestHandler, TCPServer
from typing import Any
from urllib.error import URLError

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models
from torchvision.transforms import Compose, RandomCrop, Resize, ToTensor, v2

from classifiers import TINY, TOWER, Net, saved
from featinv_pl.__main__ import main
from featinv_pl.errors import UserError
from featinv_pl.nets import hub
from featinv_pl.nets.backbone import Backbone
from featinv_pl.nets.frozen import digest


def net_at_its_first_layer() -> Backbone:
    """What a class path may name besides a class."""
    return Backbone.from_module(Net(), layer="net.1")


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)).resize((120, 90))


@pytest.fixture(autouse=True)
def leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATINV_IMPORTS", __name__)


def agrees(backbone: Backbone, picture: Image.Image, expected: Tensor, atol: float = 1e-5) -> Tensor:
    """The map of a picture, whose logits are as expected."""
    features: Tensor
    features, logits = backbone(backbone.crop(picture)[None])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=atol)
    assert backbone.feature_shape == features.shape[1:]
    assert backbone.num_classes == logits.shape[1]
    return features


# transformers


def tokens_as_map(tokens: Tensor, side: int) -> Tensor:
    return tokens[:, -(side**2) :].transpose(1, 2).reshape(len(tokens), -1, side, side)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "side"), [("vit", 4), ("resnet", None), ("swin", 8)])
def test_classifies_as_transformers_does(kind: str, side: int | None, picture: Image.Image) -> None:
    model, processor = saved(kind)
    pixels = processor(images=picture, return_tensors="pt")["pixel_values"]
    backbone = Backbone("hf/model")
    features = agrees(backbone, picture, model(pixels).logits)
    expected = model.base_model(pixels).last_hidden_state
    torch.testing.assert_close(features, tokens_as_map(expected, side) if side else expected, rtol=1e-4, atol=1e-5)
    assert backbone.layer == model.base_model_prefix
    assert backbone.classes.label("dog") == (1 if kind == "vit" else -1)  # LABEL_1 is not a name
    assert Backbone("model").layer == backbone.layer


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "layer"),
    [
        ("clip", "encoder"),
        ("dinov2", "layernorm"),
        ("siglip", "post_layernorm"),
        ("aimv2", "rms_norm"),
        ("vit without a pooler", "layernorm"),
    ],
)
def test_towers_have_a_map_and_no_classes(kind: str, layer: str, picture: Image.Image) -> None:
    model, processor = saved(kind)
    pixels = processor(images=picture, return_tensors="pt")["pixel_values"]
    backbone = Backbone("hf/model")
    features = agrees(backbone, picture, torch.zeros(1, 0))
    expected = getattr(model, "vision_model", model)(pixels).last_hidden_state
    torch.testing.assert_close(features, tokens_as_map(expected, 4), rtol=1e-4, atol=1e-5)
    assert backbone.transform_name.startswith("bicubic" if kind in ("clip", "siglip", "dinov2") else "bilinear")
    assert (backbone.layer, backbone.classifies) == (layer, False)
    assert digest(backbone.model) == digest(Backbone("hf/model").model)


@torch.no_grad()
def test_reads_images_of_another_size(picture: Image.Image) -> None:
    model, processor = saved("vit")
    backbone = Backbone("hf/model", input_size=64)
    pixels = processor(images=picture, size={"height": 64, "width": 64}, return_tensors="pt")["pixel_values"]
    agrees(backbone, picture, model(pixels, interpolate_pos_encoding=True).logits)
    assert backbone.feature_shape == (16, 8, 8)


def damaged(change: Callable[[Path], None]) -> Callable[[], None]:
    def damage() -> None:
        saved("vit")
        change(Path("model"))

    return damage


def config(**changes: Any) -> Callable[[], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damaged(change)


def text_model() -> None:
    sizes = {**TOWER, "vocab_size": 30}
    transformers.BertForSequenceClassification(transformers.BertConfig(**sizes)).save_pretrained("model")


def without_a_head(folder: Path) -> None:
    model = transformers.ViTModel.from_pretrained(folder)
    save_file({f"vit.{name}": value for name, value in model.state_dict().items()}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (text_model, "'hf/model' is not a model of images .*the input of BertModel is input_ids"),
        (damaged(lambda folder: (folder / "preprocessor_config.json").unlink()), "not a model of images"),
        (damaged(without_a_head), r"lacks \d+ weights of ViTForImageClassification, such as classifier\.bias"),
        (config(architectures=["LlamaForImageClassification"]), "is not a model of images"),
        (config(architecture="resnet50"), "is a timm model. Give the folder without hf/"),
        (config(id2label={"0": "a", "1": "a", "2": "b"}), r"id2label in config\.json are not 3 different names"),
        (lambda: None, "'model' is neither a folder nor a file, and could not be fetched from the hub"),
    ],
)
def test_refuses_what_is_not_a_classifier_of_transformers(make: Callable[[], None], message: str) -> None:
    make()
    with pytest.raises(UserError, match=f"`backbone`: .*{message}"):
        Backbone("hf/model")


# torchvision


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Weights that torchvision finds where it would fetch those that are published."""
    state: dict[str, Tensor] = models.get_model(TINY, weights=None).state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: state)
    return state


@torch.no_grad()
def test_classifies_as_torchvision_does(published: dict[str, Tensor], picture: Image.Image) -> None:
    weights = models.get_model_weights(TINY).DEFAULT
    model = models.get_model(TINY, weights=weights).eval()
    backbone = Backbone(f"torchvision/{TINY}")
    pixels = weights.transforms()(picture)[None]
    features = agrees(backbone, picture, model(pixels))
    maps: list[Tensor] = []
    model.conv5.register_forward_hook(lambda _module, _inputs, output: maps.append(output))
    model(pixels)
    torch.testing.assert_close(features, maps[0], rtol=1e-4, atol=1e-5)
    assert (backbone.layer, backbone.feature_shape) == ("conv5", (1024, 7, 7))
    assert [backbone.classes.label(name) for name in ("n01443537", "goldfish", "1", "cat")] == [1, 1, 1, -1]
    again = Backbone(f"torchvision/{TINY}", "IMAGENET1K_V1", layer="stage3", input_size=96)
    assert (again.feature_shape, again.input_size) == ((96, 6, 6), (96, 96))


def test_ten_classes_of_a_file(picture: Image.Image) -> None:
    model = models.get_model(TINY, weights=None, num_classes=10).eval()
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, "mine.pth")
    backbone = Backbone(f"torchvision/{TINY}", "mine.pth")
    pixels = models.get_model_weights(TINY).DEFAULT.transforms()(picture)[None]
    with torch.no_grad():
        agrees(backbone, picture, model(pixels))
    backbone.save_pretrained(Path("folder"))
    again = Backbone("folder", input_size=224)
    assert again.transform_name == backbone.transform_name
    assert torch.equal(again.crop(picture), backbone.crop(picture))
    assert digest(again.model) == digest(model)
    assert (again.title, again.num_classes, again.classes.label("7")) == (f"torchvision/{TINY}", 10, 7)


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("resnet5O", "random", "'torchvision/resnet5O' is not an image classifier of torchvision. Did you mean"),
        ("fasterrcnn_resnet50_fpn", "random", "is not an image classifier of torchvision"),
        (
            TINY,
            "IMAGENET1K_V7",
            "`weights`: 'IMAGENET1K_V7' is neither a file nor published .* Give IMAGENET",
        ),
        (TINY, "other.pth", "`weights`: 'other.pth': .* tensors of the classifier .* are missing"),
        (TINY, "pretrained", r"could not be fetched from https://download.pytorch.org/.* \(.*no route"),
    ],
)
def test_refuses_what_torchvision_has_not(
    name: str, weights: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    torch.save({"fc.weight": torch.zeros(3, 2)}, "other.pth")
    with pytest.raises(UserError, match=message):
        Backbone(f"torchvision/{name}", weights)


# One's own


TRANSFORMS: dict[str, Any] = {
    "of tensors": v2.Compose(
        [v2.ToImage(), v2.Resize(40), v2.CenterCrop(32), v2.ToDtype(torch.float32, True), v2.Normalize([0.5], [0.5])]
    ),
    "published": models.ResNet18_Weights.DEFAULT.transforms(crop_size=32, resize_size=36),
    "without normalisation": Compose([Resize((32, 32)), ToTensor()]),
}


@torch.no_grad()
@pytest.mark.parametrize("name", TRANSFORMS)
def test_any_transform_of_pictures(name: str, picture: Image.Image) -> None:
    module, transform = Net(), TRANSFORMS[name]
    backbone = Backbone.from_module(module, transform=transform)
    agrees(backbone, picture, module(transform(picture)[None]), atol=1e-4)
    assert (backbone.input_size, backbone.layer, backbone.feature_shape) == ((32, 32), "net", (6, 4, 4))
    assert [backbone.classes.label(name) for name in ("cat", "owl", "0")] == [0, 2, -1]
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_a_dictionary_is_read_as_timm_does(picture: Image.Image) -> None:
    given = {"input_size": 32, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4), "crop_pct": 32 / 36}
    prepared = [Backbone.from_module(Net(), transform=one) for one in ({**given, "interpolation": "bilinear"}, None)]
    assert prepared[0].transform_name == prepared[1].transform_name
    assert torch.equal(prepared[0].crop(picture), prepared[1].crop(picture))


class Logits(nn.Module):
    """A head that returns more than logits."""

    def __init__(self, pack: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.net, self.pack = Net(), pack

    def forward(self, images: Tensor) -> Any:
        return self.pack(self.net(images), images)


@pytest.mark.parametrize(
    "pack",
    [
        lambda logits, images: {"logits": logits},
        lambda logits, images: (images, logits),
        lambda logits, images: transformers.modeling_outputs.ImageClassifierOutput(logits=logits),
    ],
)
def test_logits_within_what_a_module_returns(pack: Callable[[Tensor, Tensor], Any]) -> None:
    module = Logits(pack)
    backbone = Backbone.from_module(module, transform=Net.transform, class_names=["a", "b", "c"])
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    torch.testing.assert_close(backbone(images)[1], module.net(backbone.transform(images)))
    assert (backbone.layer, backbone.classes.label("b")) == ("net.net", 1)


POOL = nn.AdaptiveAvgPool2d(1)


@pytest.mark.parametrize(
    ("module", "layer", "shape"),
    [
        (models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5), "encoder", (16, 4, 4)),
        (models.SwinTransformer([4, 4], 8, [1, 1], [1, 2], [4, 4], num_classes=5), "permute", (16, 4, 4)),
        (
            nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            "0",
            (8, 8, 8),
        ),
    ],
)
def test_the_last_map_before_the_logits(module: nn.Module, layer: str, shape: tuple[int, int, int]) -> None:
    backbone = Backbone.from_module(module, transform=Net.transform)
    assert (backbone.layer, backbone.feature_shape, backbone.num_classes) == (layer, shape, 5)


class Grids(nn.Module):
    """Returns a map and no logits."""

    def forward(self, images: Tensor) -> Tensor:
        return images[:, :, ::4, ::4]


def bgr(picture: Image.Image) -> Tensor:
    swapped: Tensor = Net.transform(picture).flip(0)
    return swapped


FLAT = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3))


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (
            FLAT,
            {},
            r"`transform`: pictures cannot be prepared for 'torch\.nn\..*Sequential' \(there is none\)",
        ),
        (FLAT, {"transform": Net.transform}, "the penultimate layer of .* does not return a spatial map"),
        (Grids(), {"transform": Net.transform}, r"returns a tensor \(2, 3, 8, 8\) and not logits"),
        (nn.Linear(5, 3), {"transform": Net.transform}, r"cannot classify RGB images of 32 x 32 pixels \(RuntimeError"),
        (nn.Embedding(9, 3), {"transform": Net.transform}, "cannot classify RGB images"),
        (Net, {}, r"is a type, and not a torch\.nn\.Module"),
        (Net(), {"layer": "net.9"}, r"`layer`: '.*Net' has no layer 'net\.9'\. Did you mean net"),
        (Net(), {"layer": "head"}, "`layer`: 'head' of .* does not return a spatial map"),
        (Net(), {"class_names": ["cat", "dog"]}, "`class_names` are not 3 different names, .* but 2"),
        (Net(), {"class_names": ["cat", "cat", "dog"]}, "`class_names` are not 3 different names"),
        (Net(), {"transform": ToTensor()}, "the images that it makes have several sizes"),
        (Net(), {"transform": Compose([RandomCrop(32), ToTensor()])}, "it is random"),
        (Net(), {"transform": v2.Resize((32, 32))}, r"it makes Image and not a tensor \(3, H, W\)"),
        (Net(), {"transform": bgr}, "it does more than resize, crop and normalise"),
        (Net(), {"transform": {"input_size": 32}}, "it lacks mean and std"),
        (Net(), {"transform": {"input_size": 32, "mean": [0.5], "std": [0.5]}}, "RGB images have three of each"),
    ],
)
def test_refuses_a_module(module: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Backbone.from_module(module, **options)


def test_a_class_path_makes_it() -> None:
    name = f"{__name__}.Net"
    backbone = Backbone(name)
    assert (backbone.layer, backbone.classes.label("owl"), backbone.title) == ("net", 2, name)
    assert Backbone(f"{__name__}.net_at_its_first_layer").feature_shape == (8, 8, 8)
    for made in ("Net", "net_at_its_first_layer"):
        with pytest.raises(UserError, match=r"\(32, 32\)"):
            Backbone(f"{__name__}.{made}", input_size=64)
    state = Net().state_dict()
    torch.save({"state_dict": {f"model.{key}": value for key, value in state.items()}}, "mine.ckpt")
    filled = Backbone(name, "mine.ckpt")
    assert all(torch.equal(value, state[key]) for key, value in filled.model.state_dict().items())
    filled.save_pretrained(Path("folder"))
    assert digest(Backbone("folder").model) == digest(filled.model) != digest(backbone.model)


@pytest.mark.parametrize(
    ("name", "imports", "message"),
    [
        (f"{__name__}.Net", "", f"not trusted: '{__name__}.Net' would be imported and run"),
        (f"{__name__}.Net", "test", f"not trusted: '{__name__}.Net'"),
        (f"{__name__}.Gone", __name__, r"could not be imported and called without arguments \(AttributeError"),
        ("elsewhere.Net", "elsewhere", r"\(ModuleNotFoundError: .*PYTHONPATH=\. for one in this folder"),
        (f"{__name__}.bgr", __name__, r"called without arguments \(TypeError"),
        (f"{__name__}.TOWER.copy", __name__, "could not be imported"),
        ("elsewhere.Net", "", "is neither a folder nor a timm model"),
    ],
)
def test_refuses_a_class_path(name: str, imports: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATINV_IMPORTS", imports)
    with pytest.raises(UserError, match=message):
        Backbone(name)


# The hub, or what stands in for it


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The hub, in which one repository is gated and no other exists; what was asked of it."""
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            gated = "gated" in self.path
            self.send_response(200 if self.path == "/" else 403 if gated else 404)
            self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET  # noqa: N815 (names of the standard library)

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Hub) as listening:
        threading.Thread(target=listening.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{listening.server_port}")
        yield asked
        listening.shutdown()


def test_a_gated_or_missing_repository(server: list[str]) -> None:
    with pytest.raises(UserError, match=r"'org/gated' is gated: .* log in with `hf auth login`"):
        Backbone("hf/org/gated")
    with pytest.raises(UserError, match=r"'org/nothing' is neither .* could not be fetched from the hub .*404"):
        Backbone("hf/org/nothing")
    assert any("org/nothing" in path for path in server)


@pytest.mark.parametrize("name", ["hf/org/name", "resnet18.a1_in1k", "hf-hub:org/name"])
def test_an_absent_hub_is_asked_once(name: str, server: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_answers", lambda _endpoint: False)
    with pytest.raises(UserError, match=rf"'{name.removeprefix('hf/')}'.*127\.0\.0\.1.* does not answer"):
        Backbone(name)
    assert not server
    assert not huggingface_hub.constants.HF_HUB_OFFLINE  # it may be back


def test_the_command_asks_a_hub_that_hangs_up_once_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And would have waited at most ten seconds, had it said nothing."""
    asked: list[Any] = []

    class Closing(TCPServer):
        def process_request(self, request: Any, client_address: Any) -> None:
            asked.append(client_address)
            self.shutdown_request(request)

    with Closing(("127.0.0.1", 0), BaseRequestHandler) as listening:
        threading.Thread(target=listening.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{listening.server_address[1]}")
        with pytest.raises(SystemExit):
            main(
                [
                    "predict",
                    "--model=FeatureExtraction",
                    "--model.backbone=hf/org/name",
                    "--model.autoencoder=x",
                    "--data=DigitsData",
                ]
            )
        listening.shutdown()
    error = capsys.readouterr().err.splitlines()[-1]
    assert "error: --model.backbone: 'org/name' is neither" in error
    assert "does not answer" in error
    assert len(asked) * hub.PATIENCE <= 10


def test_a_server_that_says_nothing_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "PATIENCE", 0.1)
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as deaf:
        assert not hub._answers(f"http://127.0.0.1:{deaf.server_port}")
    assert not hub._answers(f"http://127.0.0.1:{deaf.server_port}")  # nobody listens
