"""What users of diffusers expect of a pipeline, and folders that are refused."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file

import featinv_pl
from featinv_pl.errors import UserError
from featinv_pl.inverter.model_folder import Facts, model_card
from featinv_pl.inverter.pipeline import FeatInvPipeline
from featinv_pl.nets.hub import SUMS
from featinv_pl.sampling.sampler import Refinement

CKPT = "inversion.ckpt"


@pytest.fixture
def model(inverter_folder: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(inverter_folder, tmp_path / "model"))


@pytest.fixture
def own(inverter_folder: Path) -> FeatInvPipeline:
    """A pipeline to change."""
    loaded = FeatInvPipeline.from_pretrained(str(inverter_folder))
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="session")
def array() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)


def largest(one: Any, other: Any) -> int:
    """The largest difference of two pictures, in bytes: of other batches, sums are ordered differently."""
    return int(np.abs(np.asarray(one, int) - np.asarray(other, int)).max())


def test_pictures_and_samples_share_a_batch(own: FeatInvPipeline, array: NDArray[np.uint8]) -> None:
    pictures = [Image.fromarray(array).convert("RGBA"), Image.effect_noise((60, 50), 60)]
    sizes: list[int] = []
    own.inverter.control.encoder.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    together = own(pictures, num_samples=2)
    assert sizes == [4]
    alone = own(pictures[1], num_images_per_prompt=2, batch_size=1)
    assert sizes == [4, 1, 1]
    assert [image.size for image in together.images] == [(32, 32)] * 4
    assert largest(together.images[2], alone.images[0]) <= 1
    assert largest(together.images[3], alone.images[1]) <= 1
    assert largest(together.images[2], together.images[3]) > 1
    own.with_sampler(refine=Refinement(1))
    sizes.clear()
    own.inverter.image_size, most = 256, own.inverter.classifier.feature_shape
    own(features=torch.rand(5, *most), num_inference_steps=1)
    assert sizes == [4, 1]  # of 256 pixels, with refinement


def test_output_measures_what_the_images_are(own: FeatInvPipeline, array: NDArray[np.uint8]) -> None:
    output: Any = own(array, num_samples=2)
    seen = own.inverter.classifier.classify(own.crop(output.images))  # of the pictures' very bytes
    target = own.classify(own.crop(array))["features"]
    torch.testing.assert_close(output.maps, seen["features"])
    torch.testing.assert_close(output.logits, seen["logits"])
    angle = (seen["features"] * target).sum(1) / seen["features"].norm(dim=1) / target.norm(dim=1)
    torch.testing.assert_close(output.cosine, angle.mean((1, 2)))
    assert output[0] is output.images is output["images"]
    made: list[Any] = [own(array, num_samples=2, output_type=kind).images for kind in ("pt", "np")]
    tensor, numbers = made
    assert tensor.shape == (2, 3, 32, 32)
    assert numbers.shape == (2, 32, 32, 3)
    for number, picture in enumerate(output.images):
        assert largest(tensor[number].permute(1, 2, 0) * 255 + 0.5, picture) == 0
        assert largest(numbers[number] * 255 + 0.5, picture) == 0
    again = own(tensor)  # what comes out can go in
    assert largest(again.images[0], own(output.images[0]).images[0]) <= 1


def test_a_picture_may_have_any_form(own: FeatInvPipeline, array: NDArray[np.uint8], tmp_path: Path) -> None:
    Image.fromarray(array).save("picture.png")
    chw = torch.from_numpy(array).permute(2, 0, 1)
    expected = own.crop(Image.fromarray(array))
    forms: list[Any] = [
        tmp_path / "picture.png",
        "picture.png",
        array,
        array / 255,
        array.astype(np.float32) / 255,
        chw,
    ]
    forms += [chw / 255, chw.double() / 255]
    assert all(torch.equal(own.crop(one), expected) for one in forms)
    assert torch.equal(own.crop(forms), expected.expand(len(forms), -1, -1, -1))
    assert torch.equal(own.crop(np.stack([array, array])), expected.expand(2, -1, -1, -1))
    assert torch.equal(own.crop(torch.stack([chw, chw])), expected.expand(2, -1, -1, -1))
    grey = own.crop(array[..., 0])
    assert torch.equal(grey, own.crop(chw[:1]))
    assert torch.equal(grey[:, 0], grey[:, 1])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("https://example.org/cat.jpg", "is the address 'https://example.org/cat.jpg', and nothing is downloaded"),
        ("missing.png", "'missing.png' cannot be read as a picture .there is no such file"),
        ([], "there are none"),
        (b"bytes", "cannot read a picture from bytes"),
        ([1], "number 0 is of the type int"),
        (np.zeros((3, 40, 50), np.uint8), r"use array.transpose\(1, 2, 0\)"),
        (np.zeros((40, 50, 3), np.int64), "its values are int64, and pictures are uint8"),
        (np.full((40, 50, 3), 2.0), "its floats reach from 2 to 2, and pictures of floats from 0 to 1"),
        (torch.full((3, 40, 50), -1.0), "its floats reach from -1 to -1"),
        (torch.full((3, 40, 50), torch.nan), "its floats reach from nan"),
        (torch.zeros(40, 50), r"a tensor of shape \(40, 50\)"),
    ],
)
def test_refuses_a_picture(given: Any, message: str, pipeline: FeatInvPipeline) -> None:
    with pytest.raises(UserError, match=f"^`pictures`.*{message}"):
        pipeline(given)


def test_maps_may_have_any_float_precision(own: FeatInvPipeline) -> None:
    features = torch.randn(own.inverter.classifier.feature_shape).half()
    [expected] = own(features=features).images
    for one in (features, features.double(), features.float().numpy(), features[None]):
        assert own(features=one).images == [expected]
    assert own(features).images == [expected]  # told from a picture by its channels
    assert own(features=features[None].bfloat16()).cosine.shape == (1,)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(3, 4, 4), r"the shape is \(3, 4, 4\), and this inverter reads maps of \(8, 4, 4\)"),
        (torch.zeros(8, 5, 5), r"the shape is \(8, 5, 5\)"),
        (torch.zeros(1, 1, 8, 4, 4), r"the shape is \(1, 1, 8, 4, 4\)"),
        (torch.zeros(0, 8, 4, 4), r"the shape is \(0, 8, 4, 4\)"),
        (torch.zeros(8, 4, 4, dtype=torch.int), "the values are torch.int32"),
        (torch.full((8, 4, 4), torch.inf), "some values are NaN or infinite"),
    ],
)
def test_refuses_a_map(given: torch.Tensor, message: str, pipeline: FeatInvPipeline) -> None:
    with pytest.raises(UserError, match=f"^`features`: {message}"):
        pipeline(features=given)


def test_noise_comes_from_a_seed_or_from_generators(own: FeatInvPipeline) -> None:
    features = torch.randn(2, *own.inverter.classifier.feature_shape)

    def images(*numbers: int, **options: Any) -> list[Image.Image]:
        made = [torch.Generator().manual_seed(number) for number in numbers]
        given: Any = {"generator": made if len(made) > 1 else made[0]} if made else {}
        return list(own(features=features, **given, **options).images)

    assert images() == images(seed=0) != images(seed=1)
    assert images(5) == images(5) != images(6)
    assert largest(images(5, 6)[0], images(5, 7)[0]) == 0
    assert largest(images(5, 6)[1], images(5, 7)[1]) > 1
    rng = torch.Generator().manual_seed(0)
    assert own(features=features, generator=rng).images != own(features=features, generator=rng).images


def test_each_step_can_be_seen_and_changed(own: FeatInvPipeline, capsys: pytest.CaptureFixture[str]) -> None:
    features, steps = torch.randn(3, *own.inverter.classifier.feature_shape), []

    def watch(pipe: FeatInvPipeline, step: int, timestep: torch.Tensor, given: dict[str, Any]) -> None:
        steps.append((pipe, step, int(timestep), tuple(given["latents"].shape)))

    own.set_progress_bar_config(desc="mine")
    plain = own(features=features, batch_size=2, num_inference_steps=3, callback_on_step_end=watch)
    assert "mine: 100%" in capsys.readouterr().err
    assert [step[1] for step in steps] == [0, 1, 2] * 2
    assert [step[3][0] for step in steps] == [2, 2, 2, 1, 1, 1]
    assert steps[0][2] > steps[1][2] > steps[2][2]
    assert all(step[0] is own for step in steps)
    zeros = own(
        features=features, callback_on_step_end=lambda *given: {"latents": torch.zeros_like(given[-1]["latents"])}
    )
    assert zeros.images[0] == zeros.images[1] == zeros.images[2] != plain.images[0]
    assert list(own.progress_bar(range(3))) == [0, 1, 2]
    assert "mine: 100%" in capsys.readouterr().err
    own.set_progress_bar_config(disable=True)
    own(features=features)
    assert not capsys.readouterr().err


def test_sampler_of_one_call(own: FeatInvPipeline) -> None:
    features = torch.randn(own.inverter.classifier.feature_shape)
    before = own.inverter.sampler
    once = own(features=features, num_inference_steps=3, guidance_scale=2).images
    assert own.inverter.sampler == before
    assert own(features=features).images != once
    assert own.with_sampler(steps=3, guidance_scale=2.0)(features=features).images == once


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "`num_samples` cannot be 0. Give a whole number of at least 1"),
        ({"num_images_per_prompt": 1.5}, "`num_images_per_prompt` cannot be 1.5"),
        ({"num_samples": 1, "num_images_per_prompt": 2}, "are two names of the same"),
        ({"num_inference_steps": 0}, "`num_inference_steps` cannot be 0"),
        ({"guidance_scale": float("nan")}, "`guidance_scale` cannot be nan"),
        ({"guidance_scale": "2"}, "`guidance_scale` cannot be '2'"),
        ({"seed": -1}, "`seed` cannot be -1"),
        ({"seed": 1, "generator": torch.Generator()}, "cannot be given together"),
        ({"generator": [torch.Generator()] * 3}, "there are 3 for 1 reconstructions"),
        ({"generator": 5}, "`generator` cannot be int"),
        ({"batch_size": 0}, "`batch_size` cannot be 0"),
        ({"output_type": "latent"}, "`output_type` cannot be 'latent'. Give pil, pt or np"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "prompt_embeds cannot be had"),
        ({"pictures": "cat.jpg"}, "Give either `pictures` or `features`"),
    ],
)
def test_refuses_an_argument_in_words_of_python(
    options: dict[str, Any], message: str, pipeline: FeatInvPipeline
) -> None:
    with pytest.raises(UserError, match=message) as error:
        pipeline(**{"features": torch.zeros(8, 4, 4), **options})
    assert "--" not in str(error.value)


PLACES: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((torch.bfloat16,), {}),
    (("cpu", torch.bfloat16), {}),
    ((torch.device("cpu"),), {"dtype": torch.bfloat16}),
    ((), {"device": "cpu", "dtype": torch.bfloat16}),
    ((torch.zeros(1, dtype=torch.bfloat16),), {}),
    ((torch.bfloat16,), {"non_blocking": True}),
]


def test_moves_as_torch_does(own: FeatInvPipeline, inverter_folder: Path) -> None:
    assert own.to("cpu") is own.to("cpu", None) is own
    assert own.dtype == torch.float32
    features = torch.randn(own.inverter.classifier.feature_shape)
    [exact] = own(features=features).images
    for args, kwargs in PLACES:
        moved = FeatInvPipeline.from_pretrained(inverter_folder).to(*args, **kwargs)
        assert (moved.dtype, moved.device) == (torch.bfloat16, torch.device("cpu"))
        assert moved.inverter.prior.unet.conv_in.weight.dtype == torch.bfloat16
        assert next(moved.inverter.classifier.parameters()).dtype == torch.float32
    [rounded] = moved(features=features).images
    assert 0 < np.abs(np.asarray(exact, int) - np.asarray(rounded, int)).mean() < 4
    loaded = FeatInvPipeline.from_pretrained(inverter_folder, device="cpu", torch_dtype=torch.bfloat16)
    assert loaded(features=features).images == [rounded]
    for held in (moved, moved.to(torch.float32)):  # rounded for good
        with pytest.raises(UserError, match=r"has held its weights in torch.bfloat16. Load it again"):
            held.save_pretrained("again")
    assert not Path("again").exists()


def test_is_never_half_moved(own: FeatInvPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: list[tuple[tuple[Any, ...], str]] = [
        (("nowhere",), "Expected one of cpu"),
        ((torch.float64,), "`dtype` cannot be torch.float64. Give one of torch.float32, torch.bfloat16, torch.float16"),
        (("meta",), "`device` cannot be meta"),
    ]
    if not torch.cuda.is_available():
        wrong.append((("cuda", torch.bfloat16), "`device` or `dtype` cannot be used"))
    for args, message in wrong:
        with pytest.raises(UserError, match=message):
            own.to(*args)

    *_, last = own.inverter.control.parameters()
    before = {name: value.dtype for name, value in own.inverter.state_dict().items()}
    move = torch.Tensor.to

    def full(tensor: torch.Tensor, *args: Any) -> torch.Tensor:
        if tensor.data_ptr() == last.data_ptr():
            raise torch.OutOfMemoryError("no memory for the last tensor")
        return move(tensor, *args)

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "to", full)
        with pytest.raises(torch.OutOfMemoryError):
            own.to("cpu", torch.bfloat16)
    assert {name: value.dtype for name, value in own.inverter.state_dict().items()} == before
    assert own.dtype == torch.float32


def test_says_what_it_is(pipeline: FeatInvPipeline) -> None:
    said = repr(pipeline)
    assert said.startswith("FeatInvPipeline(\n  classifier: test_resnet, layer forward_features, maps of 8x4x4\n")
    assert "device: cpu, dtype: torch.float32" in said
    assert pipeline.components.keys() == {"classifier", "unet", "vae", "scheduler", "encoder", "controlnet"}
    assert featinv_pl.FeatInvPipeline is FeatInvPipeline


def test_runs_and_checkpoints_are_loaded(uninterrupted_run: Path) -> None:
    state = torch.random.get_rng_state()
    whole, alone = (FeatInvPipeline.from_pretrained(one) for one in (uninterrupted_run, uninterrupted_run / CKPT))
    assert torch.equal(torch.random.get_rng_state(), state)
    saved = torch.load(uninterrupted_run / CKPT, weights_only=True)["state_dict"]
    for name, value in whole.inverter.control.state_dict().items():
        assert torch.equal(value, saved[f"control.{name}"])
        assert torch.equal(value, alone.inverter.control.state_dict()[name])
    shutil.copy(uninterrupted_run / CKPT, CKPT)
    with pytest.raises(UserError, match=r"^`source`: no fit.yaml beside or above 'inversion.ckpt'"):
        FeatInvPipeline.from_pretrained(CKPT)
    with pytest.raises(UserError, match=r"^`revision`: .* is on this disk"):
        FeatInvPipeline.from_pretrained(uninterrupted_run, revision="main")
    Path("empty").mkdir()
    with pytest.raises(UserError, match=r"^`source`: there is no file 'empty/model_index.json'"):
        FeatInvPipeline.from_pretrained("empty")


def test_saves_a_card_and_keeps_that_of_the_same_control(own: FeatInvPipeline, model: Path) -> None:
    own.save_pretrained("first")
    card = Path("first/README.md").read_text()
    for words in ("license: unknown\n", "None were measured with these weights.", "has not said how it was trained"):
        assert words in card
    (model / "README.md").write_text("measured: 0.9")
    loaded = FeatInvPipeline.from_pretrained(model)
    loaded.save_pretrained(Path("same"))
    assert Path("same/README.md").read_text() == "measured: 0.9"
    with torch.no_grad():
        next(loaded.inverter.control.parameters()).add_(1)
    loaded.save_pretrained("changed")
    assert "measured: 0.9" not in Path("changed/README.md").read_text()
    with pytest.raises(UserError, match=r"^`folder`: 'changed' exists, and is left as it is"):
        loaded.save_pretrained("changed")
    named = model_card(own.inverter, "mine", Facts(license="mit"))
    assert "license: mit\n" in named


INDEX, CONTROL, CLASSIFIER = "model_index.json", "controlnet/diffusion_pytorch_model.safetensors", "model.safetensors"


def without_a_bias(path: Path) -> None:
    save_file({name: value for name, value in load_file(path).items() if name != "conv_in.bias"}, path)


def with_other_weights(path: Path) -> None:
    save_file({name: value + 1 for name, value in load_file(path).items()}, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (INDEX, Path.unlink, "there is no file '.*/model_index.json'"),
        (INDEX, lambda path: path.write_text("{}"), "model_index.json' is damaged"),
        ("encoder", shutil.rmtree, "there is no file '.*encoder/diffusion_pytorch_model.safetensors'"),
        (CONTROL, without_a_bias, "1 tensors of the controlnet in '.*model' are missing"),
        (f"backbone/{CLASSIFIER}", with_other_weights, r"are not those that its control was trained with \(backbone: "),
    ],
)
def test_refuses_a_model(name: str, damage: Callable[[Path], object], message: str, model: Path) -> None:
    (model / SUMS).unlink()  # as in older folders
    damage(model / name)
    with pytest.raises(UserError, match=message):
        FeatInvPipeline.from_pretrained(model)


def test_every_change_of_a_model_is_noticed(model: Path) -> None:
    """Except of its card, which its author may edit; `sha256sum` reads the same file."""
    (model / "README.md").write_text("Another card")
    (model / ".gitattributes").write_text("what a hub adds")
    subprocess.run(["sha256sum", "--check", "--quiet", SUMS], cwd=model, check=True)
    FeatInvPipeline.from_pretrained(model)
    (model / "encoder" / "more.json").write_text("{}")
    with pytest.raises(UserError, match=r"1 files of .* such as 'encoder/more.json'. Copy the folder"):
        FeatInvPipeline.from_pretrained(model)
