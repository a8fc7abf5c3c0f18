"""The authors' model, brought over from its original layout, computes what theirs computes."""

import json
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
from featinv_pl.nets.prior import Prior
from featinv_pl.nets.prompts import FILE as PROMPTS
from featinv_pl.nets.prompts import LENGTH, PROMPT
from featinv_pl.nets.supported import SCHEDULE

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    return parity.state_dict()


# Parity


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    torch.set_num_threads(1)
    return parity.figures(parity.imported(tmp_path_factory.mktemp("golden")))


def test_computes_what_the_authors_code_computes(differences: dict[str, float]) -> None:
    assert len(differences) == 33
    sampled = differences["latents sampled in 10 steps"]
    assert sampled <= parity.SAMPLED_BOUND
    assert {name: value for name, value in differences.items() if value > parity.BOUND} == {}


def test_control_takes_the_names_of_the_unet_that_it_copies(state: State) -> None:
    """The one way that a wrong name could hide at the recorded model's width: exchanged biases."""
    unet = ldm.unet(state, "CKPT", num_heads=4)
    names = {name.removeprefix(ldm.UNET) for name in state if name.startswith(ldm.UNET)}
    copied = {
        name: state[ldm.UNET + name.removeprefix(ldm.CONTROL)] if name.removeprefix(ldm.CONTROL) in names else value
        for name, value in state.items()
        if name.startswith(ldm.CONTROL)
    }
    control = FeatureControl(unet, parity.CHANNELS, Encoder())
    ldm.load_control(control, copied, "CKPT")
    theirs = unet.state_dict()
    ours = {name: value for name, value in control.controlnet.state_dict().items() if name in theirs}
    assert len(ours) == 298
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_every_tensor_of_the_file_arrives(state: State) -> None:
    parts = (ldm.unet(state, "CKPT"), ldm.autoencoder(state, "CKPT"))
    for prefix, network in zip((ldm.UNET, ldm.AUTOENCODER), parts, strict=True):
        theirs = sorted(float(value.double().sum()) for value in ldm.part(state, prefix).values())
        ours = sorted(float(value.double().sum()) for value in network.state_dict().values())
        assert ours == theirs


def test_shapes_of_stable_diffusion_give_its_configuration() -> None:
    """At full width, with no memory: the sizes that the paper's prior has."""
    with torch.device("meta"):
        expected = UNet2DConditionModel(sample_size=32, cross_attention_dim=768)
    config = ldm._unet_config(full_size_ldm_unet(), "CKPT")
    assert {name: expected.config[name] for name in config} == {
        name: tuple(value) if isinstance(value, list) else value for name, value in config.items()
    }


def full_size_ldm_unet() -> State:
    """The few tensors of Stable Diffusion 1's UNet, in LDM's layout, that tell its architecture."""
    widths = {
        "input_blocks.0.0.weight": (320, 4),
        "out.2.weight": (4, 320),
        "middle_block.0.out_layers.3.weight": (1280,),
    }
    widths |= {f"input_blocks.{block}.0.op.weight": (width,) for block, width in ((3, 320), (6, 640), (9, 1280))}
    widths |= {f"input_blocks.{block}.1.norm.weight": (1,) for block in (1, 2, 4, 5, 7, 8)}
    widths |= {
        "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        "input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
    }
    return {name: torch.empty(shape, device="meta") for name, shape in widths.items()}


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
def folder(state: State, text_encoder: CLIPTextModel, tmp_path: Path) -> Path:
    """In diffusers' layout, with a text encoder in place of stored prompts."""
    folder = parity.write_prior(tmp_path / "folder", state)
    (folder / PROMPTS).unlink()
    text_encoder.save_pretrained(folder / "text_encoder")
    write_tokenizer(folder / "tokenizer")
    return folder


@pytest.fixture
def whole(state: State, text_encoder: CLIPTextModel, tmp_path: Path) -> State:
    """The same in LDM's layout, beside a tokenizer, which such files lack."""
    write_tokenizer(tmp_path / "tokenizer")
    prefix = ldm.TEXT_ENCODER + "text_model."
    frozen = {name: value for name, value in state.items() if not name.startswith(ldm.CONTROL)}
    return {
        **frozen,
        **{prefix + name: value for name, value in text_encoder.state_dict().items()},
        "betas": torch.ones(9),
    }


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_one_file_is_the_same_prior_as_a_folder(suffix: str, folder: Path, whole: State, tmp_path: Path) -> None:
    file = tmp_path / f"miniSD{suffix}"
    if suffix == ".ckpt":
        torch.save({"state_dict": whole, "global_step": 7}, file)
    else:
        save_file(whole, file)
    one, other = Prior(str(file)), Prior(str(folder))
    assert digest(one) == digest(other)
    for name, value in SCHEDULE.items():
        assert one.schedule.config[name] == value == other.schedule.config[name]
    assert digest(LatentAutoencoder.load(str(file))) == digest(LatentAutoencoder.load(str(folder)))
    assert not any("text" in name for name, _ in one.named_modules())


def test_prompts_are_encoded_as_stable_diffusion_does_and_once(folder: Path, text_encoder: CLIPTextModel) -> None:
    prior = Prior(str(folder))
    vocabulary = json.loads((folder / "tokenizer" / "vocab.json").read_text())
    ends = vocabulary["<|endoftext|>"]
    nothing = torch.tensor([[vocabulary["<|startoftext|>"], *[ends] * (LENGTH - 1)]])
    with torch.no_grad():
        torch.testing.assert_close(prior.empty, text_encoder(nothing).last_hidden_state[0])
    assert prior.prompt.shape == (LENGTH, 32)
    assert not torch.allclose(prior.prompt, prior.empty)
    assert PROMPT == "a high-quality, detailed, and professional image"

    (folder / "tokenizer" / "vocab.json").write_text("no longer read")
    assert torch.equal(Prior(str(folder)).prompt, prior.prompt)


def test_another_text_encoder_does_not_get_stored_prompts(folder: Path, text_encoder: CLIPTextModel) -> None:
    before = Prior(str(folder)).prompt
    other = CLIPTextModel(text_encoder.config)
    other.save_pretrained(folder / "text_encoder")
    assert not torch.allclose(Prior(str(folder)).prompt, before)


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        (ldm.UNET, r"the file has no UNet \(model\.diffusion_model\.\*\)"),
        (ldm.AUTOENCODER, r"the file has no autoencoder \(first_stage_model\.\*\)"),
        (ldm.TEXT_ENCODER, r"has no text encoder \(cond_stage_model\.transformer\.\*\)"),
    ],
)
def test_refuses_a_file_without_a_part(prefix: str, message: str, whole: State, tmp_path: Path) -> None:
    save_file({name: value for name, value in whole.items() if not name.startswith(prefix)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=f"`prior`:? .*{message}"):
        Prior(str(tmp_path / "x.safetensors"))


def test_refuses_a_file_for_inpainting_also_where_the_autoencoder_is_read(whole: State, tmp_path: Path) -> None:
    name = ldm.UNET + "input_blocks.0.0.weight"
    wide = torch.cat([whole[name], whole[name], whole[name][:, :1]], dim=1)
    save_file({**whole, name: wide}, tmp_path / "x.safetensors")
    for load in (Prior, LatentAutoencoder.load):
        with pytest.raises(UserError, match=r"needs 9 channels .* as for inpainting"):
            load(str(tmp_path / "x.safetensors"))


def test_refuses_another_family(whole: State, tmp_path: Path) -> None:
    """Stable Diffusion 2 projects by linear layers where 1 has convolutions."""
    second = {name: value.flatten(1) if "proj_in.weight" in name else value for name, value in whole.items()}
    save_file(second, tmp_path / "x.safetensors")
    with pytest.raises(
        UserError, match=r"`prior` '.*x.safetensors': the UNet of the file is not that of Stable Diffusion 1"
    ):
        Prior(str(tmp_path / "x.safetensors"))


def test_refuses_a_prior_whose_tokenizer_cannot_be_had(whole: State, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    save_file(whole, tmp_path / "elsewhere" / "x.safetensors")
    with pytest.raises(UserError, match=r"`prior`: the prompts could not be encoded .*openai/clip-vit-large"):
        Prior(str(tmp_path / "elsewhere" / "x.safetensors"))


# The command


@pytest.fixture
def command(state: State, tmp_path: Path) -> list[str]:
    save_file(state, tmp_path / "authors.safetensors")
    backbone, prior = parity.write_backbone(tmp_path / "backbone"), parity.write_prior(tmp_path / "prior", state)
    return ["import", "authors.safetensors", "model", "--model.backbone", str(backbone), "--model.prior", str(prior)]


def refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a command ends; it must leave nothing behind."""
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 1
    assert not list(Path().glob("model*"))
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("featinv-pl: error: ")
    return message


def test_import_says_what_it_found(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": parity.state_dict(), "epoch": 3, "global_step": 480_000}, "authors.ckpt")
    main(["import", "authors.ckpt", *command[2:]])
    printed = capsys.readouterr().err
    for words in (
        "control_model",
        "330 tensors",
        "UNet: that of the prior",
        "difference of a tensor: 0)",
        "48 -> 512 -> 32",
    ):
        assert words in printed
    assert (Path("model") / "controlnet" / "diffusion_pytorch_model.safetensors").is_file()
    assert "authors.ckpt" in (Path("model") / "README.md").read_text()
    with pytest.raises(SystemExit):
        main(command)
    assert "OUT: 'model' exists, and is left as it is" in capsys.readouterr().err


def test_import_refuses_another_prior(command: list[str], state: State, capsys: pytest.CaptureFixture[str]) -> None:
    name = "model.diffusion_model.input_blocks.0.0.bias"
    save_file({**state, name: state[name] * 1.01}, "authors.safetensors")
    message = refused(command, capsys)
    assert "--model.prior: the UNet of " in message
    assert "a tensor differs by 0.01 of its norm" in message


def test_import_refuses_another_backbone(
    command: list[str], classifier_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused([*command, "--model.backbone", str(classifier_folder)], capsys)
    assert (
        "CKPT 'authors.safetensors': the file holds a feature encoder for 48 channels, and the backbone's map has 8"
        in message
    )


def test_import_refuses_half_a_control(command: list[str], state: State, capsys: pytest.CaptureFixture[str]) -> None:
    del state["control_model.zero_convs.3.0.bias"]
    save_file(state, "authors.safetensors")
    assert "CKPT 'authors.safetensors': 1 tensors of the ControlNet are missing" in refused(command, capsys)
