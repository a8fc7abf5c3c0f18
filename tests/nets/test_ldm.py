"""The authors' model, brought over from its original layout, computes what theirs computes."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

import parity
from featinv_pl.__main__ import main
from featinv_pl.errors import UserError
from featinv_pl.nets import ldm
from featinv_pl.nets.autoencoder import LatentAutoencoder
from featinv_pl.nets.control import Encoder, FeatureControl
from featinv_pl.nets.frozen import digest
from featinv_pl.nets.prior import LENGTH, PROMPTS, Prior
from featinv_pl.nets.supported import SCHEDULE
from interrupts import Capture

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    torch.set_num_threads(1)
    return parity.state_dict()


@pytest.fixture(scope="module")
def authors(state: State, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recorded checkpoint `authors.safetensors`, and the `backbone` and `prior` that it belongs to."""
    return parity.write_parts(tmp_path_factory.mktemp("golden"), state)


# Parity


def test_computes_what_the_authors_code_computes(authors: Path) -> None:
    differences = parity.figures(parity.imported(authors, Path("model")))
    assert len(differences) == 33
    assert differences["latents sampled in 10 steps"] <= parity.SAMPLED_BOUND
    assert {name: value for name, value in differences.items() if value > parity.BOUND} == {}


def test_control_takes_the_names_of_the_unet_that_it_copies(state: State) -> None:
    """The one way that a wrong name could hide at the recorded model's width: exchanged biases."""
    unet = ldm.unet(state, "CKPT", num_heads=4)
    copied = {
        name: state.get(name.replace(ldm.CONTROL, ldm.UNET), value)
        for name, value in state.items()
        if name.startswith(ldm.CONTROL)
    }
    control = FeatureControl(unet, parity.CHANNELS, Encoder())
    ldm.load_control(control, copied, "CKPT")
    theirs = unet.state_dict()
    ours = {name: value for name, value in control.controlnet.state_dict().items() if name in theirs}
    assert len(ours) == 298
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_shapes_of_stable_diffusion_give_its_configuration() -> None:
    """At full width, with no memory: the few tensors of its UNet that tell the architecture."""
    shapes = {
        "input_blocks.0.0.weight": (320, 4),
        "out.2.weight": (4, 320),
        "middle_block.0.out_layers.3.weight": (1280,),
        "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        "input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
        **{f"input_blocks.{block}.0.op.weight": (width,) for block, width in ((3, 320), (6, 640), (9, 1280))},
        **{f"input_blocks.{block}.1.norm.weight": (1,) for block in (1, 2, 4, 5, 7, 8)},
    }
    with torch.device("meta"):
        config = ldm._unet_config({name: torch.empty(shape) for name, shape in shapes.items()}, "CKPT")
        expected = UNet2DConditionModel(sample_size=32, cross_attention_dim=768).config
    assert {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()} == {
        name: expected[name] for name in config
    }


# A prior in one file, and the same prior as a folder


@pytest.fixture(scope="module")
def text_encoder() -> CLIPTextModel:
    torch.manual_seed(5)
    config = CLIPTextConfig(
        vocab_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=1,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return CLIPTextModel(config)


def write_tokenizer(folder: Path) -> None:
    """A tokenizer that knows letters it may meet, and takes all others for unknown."""
    folder.mkdir(parents=True)
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *"aegilmnopstu", "a</w>", "e</w>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))


@pytest.fixture
def folder(authors: Path, text_encoder: CLIPTextModel, tmp_path: Path) -> Path:
    """In diffusers' layout, with a text encoder in place of stored prompts."""
    folder = Path(shutil.copytree(authors / "prior", tmp_path / "folder"))
    (folder / PROMPTS).unlink()
    text_encoder.save_pretrained(folder / "text_encoder")
    write_tokenizer(folder / "tokenizer")
    return folder


@pytest.fixture
def whole(state: State, text_encoder: CLIPTextModel, tmp_path: Path) -> State:
    """The same in LDM's layout, beside a tokenizer, which such files lack."""
    write_tokenizer(tmp_path / "tokenizer")
    prefix = ldm.TEXT_ENCODER + "text_model."
    return {
        **{name: value for name, value in state.items() if not name.startswith(ldm.CONTROL)},
        **{prefix + name: value for name, value in text_encoder.state_dict().items()},
        "betas": torch.ones(9),
    }


def test_one_file_is_the_same_prior_as_a_folder(folder: Path, whole: State) -> None:
    torch.save({"state_dict": whole, "global_step": 7}, "miniSD.ckpt")
    save_file(whole, "miniSD.safetensors")
    one, other = Prior("miniSD.ckpt"), Prior(str(folder))
    assert digest(one) == digest(other)
    for name, value in SCHEDULE.items():
        assert one.schedule.config[name] == value == other.schedule.config[name]
    alone = [digest(LatentAutoencoder.load(source)) for source in ("miniSD.safetensors", str(folder))]
    assert alone == [digest(one.autoencoder)] * 2
    assert not any("text" in name for name, _ in one.named_modules())


def test_prompts_are_encoded_as_stable_diffusion_does_and_once(folder: Path, text_encoder: CLIPTextModel) -> None:
    prior = Prior(str(folder))
    nothing = torch.tensor([[0, *[1] * (LENGTH - 1)]])  # the start of a text, and its end
    with torch.no_grad():
        torch.testing.assert_close(prior.empty, text_encoder(nothing).last_hidden_state[0])
    assert prior.prompt.shape == (LENGTH, 32)
    assert not torch.allclose(prior.prompt, prior.empty)
    vocabulary = (folder / "tokenizer/vocab.json").read_text()
    (folder / "tokenizer/vocab.json").write_text("no longer read")
    assert torch.equal(Prior(str(folder)).prompt, prior.prompt)
    (folder / "tokenizer/vocab.json").write_text(vocabulary)
    CLIPTextModel(text_encoder.config).save_pretrained(folder / "text_encoder")  # another, of random weights
    assert not torch.allclose(Prior(str(folder)).prompt, prior.prompt)


def without(prefix: str) -> Callable[[State], State]:
    return lambda whole: {name: value for name, value in whole.items() if not name.startswith(prefix)}


def linear(whole: State) -> State:
    """Stable Diffusion 2 projects by linear layers where 1 has convolutions."""
    return {name: value.flatten(1) if "proj_in.weight" in name else value for name, value in whole.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(ldm.UNET), r"the file has no UNet \(model\.diffusion_model\.\*\)"),
        (without(ldm.AUTOENCODER), r"the file has no autoencoder \(first_stage_model\.\*\)"),
        (without(ldm.TEXT_ENCODER), r"the file has no text encoder \(cond_stage_model\.transformer\.\*\)"),
        (linear, "the UNet of the file is not that of Stable Diffusion 1"),
        (dict, r"the prompts could not be encoded .*openai/clip-vit-large"),  # without a tokenizer
    ],
)
def test_refuses_a_file(change: Callable[[State], State], message: str, whole: State) -> None:
    Path("elsewhere").mkdir()
    save_file(change(whole), "elsewhere/x.safetensors")
    with pytest.raises(UserError, match=rf"`prior`( '.*x\.safetensors')?: .*{message}"):
        Prior("elsewhere/x.safetensors")


# The command


def run(authors: Path, checkpoint: str, *more: str) -> None:
    frozen = ["--model.backbone", str(authors / "backbone"), "--model.prior", str(authors / "prior")]
    main(["import", checkpoint, "model", *frozen, *more])


def test_import_says_what_it_found(authors: Path, state: State, capsys: Capture) -> None:
    torch.save({"state_dict": state, "epoch": 3, "global_step": 480_000}, "authors.ckpt")
    run(authors, "authors.ckpt")
    printed = capsys.readouterr().err
    for words in ("control_model, 330 tensors", "UNet: that of the prior", "tensor: 0)", "48 -> 512 -> 32"):
        assert words in printed
    assert Path("model/controlnet/diffusion_pytorch_model.safetensors").is_file()
    assert "authors.ckpt" in Path("model/README.md").read_text()
    with pytest.raises(SystemExit):
        run(authors, "authors.ckpt")
    assert "OUT: 'model' exists, and is left as it is" in capsys.readouterr().err


def test_import_refuses_other_parts(authors: Path, state: State, classifier_folder: Path, capsys: Capture) -> None:
    name = "model.diffusion_model.input_blocks.0.0.bias"
    save_file({**state, name: state[name] * 1.01}, "prior.safetensors")
    save_file(without("control_model.zero_convs.3.0.bias")(state), "half.safetensors")
    whole = str(authors / "authors.safetensors")
    for command, message in (
        (["prior.safetensors"], "--model.prior: the UNet of .* .a tensor differs by 0.01 of its norm"),
        (["half.safetensors"], "CKPT 'half.safetensors': 1 tensors of the ControlNet are missing"),
        (
            [whole, "--model.backbone", str(classifier_folder)],
            "CKPT '.*': the file holds a feature encoder for 48 channels, and the backbone's map has 8",
        ),
    ):
        with pytest.raises(SystemExit, match="1"):
            run(authors, *command)
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert re.match(f"featinv-pl: error: {message}", last), last
        assert not list(Path().glob("model*"))
