"""The moving average of what is trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from conftest import MakeBatch
from featinv_pl.errors import UserError
from featinv_pl.nets.control import Encoder
from featinv_pl.runtime.averaging import MovingAverage
from featinv_pl.tasks.inversion import FeatureInversion
from tiny import TRAINER

DECAY = 0.8


class History(Callback):
    """Keeps the weights after each step, and those that validation sees."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.validated: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        self.weights.append({name: value.clone() for name, value in pl_module.inverter.control.state_dict().items()})

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        self.validated.append({name: value.clone() for name, value in pl_module.inverter.control.state_dict().items()})


def test_average_is_validated_saved_and_kept(
    classifier_folder: Path, prior_folder: Path, make_batch: MakeBatch, tmp_path: Path
) -> None:
    model = FeatureInversion(str(classifier_folder), str(prior_folder), encoder=Encoder(8))
    frozen = dict(model.inverter.digests)
    history, average = History(), MovingAverage(DECAY)
    options: dict[str, Any] = {**TRAINER, "max_steps": 5, "default_root_dir": tmp_path, "enable_progress_bar": False}
    batches: Any = [make_batch(4)] * 5
    Trainer(**options, callbacks=[history, average]).fit(
        model, DataLoader(batches, batch_size=None), DataLoader(batches[:1], batch_size=None)
    )
    expected = history.weights[0]  # the first step starts it
    for step in history.weights[1:]:
        expected = {name: DECAY * old + (1 - DECAY) * step[name] for name, old in expected.items()}
    [checkpoint] = tmp_path.rglob("*.ckpt")
    saved = torch.load(checkpoint, weights_only=True)
    for name, value in expected.items():
        torch.testing.assert_close(history.validated[0][name], value)
        torch.testing.assert_close(saved["state_dict"][f"control.{name}"], value)
        torch.testing.assert_close(model.inverter.control.state_dict()[name], value)
        assert torch.equal(saved["current_model_state"][f"control.{name}"], history.weights[-1][name])
    assert {name.split(".")[0] for name in saved["state_dict"]} == {"control"}
    del model.inverter.digests
    assert model.inverter.digests == frozen
    assert any(not torch.equal(value, history.weights[-1][name]) for name, value in expected.items())
    copied: Any = average._average_model
    assert copied.module.inverter.prior is model.inverter.prior  # frozen parts take no second place in memory


@pytest.mark.parametrize("decay", [0.0, 1.5])
def test_refuses_a_decay_out_of_range(decay: float) -> None:
    with pytest.raises(UserError, match=rf"`decay` must lie between 0 and 1, and is {decay}"):
        MovingAverage(decay)
