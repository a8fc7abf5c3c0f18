"""The Python of docs/python.md runs, and a checkpoint loads alone."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from featinv_pl.errors import UserError
from featinv_pl.inverter.pipeline import FeatInvPipeline
from featinv_pl.tasks.inversion import FeatureInversion
from tiny import ROOT

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), re.DOTALL)


@pytest.fixture(autouse=True)
def demo(inverter_folder: Path, classifier_folder: Path, prior_folder: Path, digit_shards: Path) -> None:
    """What `make demo` leaves."""
    for place, made in {
        "runs/digits-inverter": inverter_folder,
        "runs/demo/classifier/model": classifier_folder,
        "runs/demo/prior/model": prior_folder,
        "runs/demo/shards": digit_shards,
        "docs": ROOT / "docs",
    }.items():
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        Path(place).symlink_to(made)


@pytest.mark.parametrize("block", BLOCKS, ids=["pipeline", "lightning", "pytorch"])
@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:The number of training batches")
def test_python_of_the_page_runs(block: str) -> None:
    names: dict[str, object] = {}
    exec(block, names)
    if "output" in names:
        assert Image.open("reconstruction.png").size == (32, 32)
    elif "again" in names:
        control = FeatInvPipeline.from_pretrained("runs/python/model").inverter.control
        trained = torch.load("runs/python/inversion.ckpt", weights_only=True)["state_dict"]
        assert all(torch.equal(value, trained[f"control.{name}"]) for name, value in control.state_dict().items())
    else:
        assert any(weight.any() for weight in names["inverter"].control.encoder.layers[-1].parameters())  # type: ignore[attr-defined]


def test_a_checkpoint_loads_alone(uninterrupted_run: Path) -> None:
    path = uninterrupted_run / "inversion.ckpt"
    model = FeatureInversion.load_from_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    assert model.loaded_step == saved["global_step"] == 5
    assert all(torch.equal(value, saved["state_dict"][name]) for name, value in model.state_dict().items())
    assert model.inverter.sampler.steps == 2
    assert isinstance(model.configure_optimizers(), torch.optim.AdamW)
    Path("inversion.ckpt").write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=r"^`checkpoint_path`: no fit.yaml beside or above"):
        FeatureInversion.load_from_checkpoint("inversion.ckpt")
