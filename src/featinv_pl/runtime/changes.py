"""Settings that have changed since the checkpoint from which a training resumes."""

import json
import warnings
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, WeightAveraging
from torch import Tensor

from featinv_pl.errors import UserError
from featinv_pl.runtime.checkpoints import OPTION
from featinv_pl.runtime.ranks import say

KEY = "settings"  # of a checkpoint
WEIGHTS = "current_model_state"  # of one whose `state_dict` is a moving average
AVERAGE = "moving average"
DERIVED = ("params", "initial_lr", "min_lr", "base_lrs", "last_epoch")
SWITCHES = ("amsgrad", "centered", "momentum")  # of optimizers: each needs a memory of its own


class Changes(Callback):
    """Applies changed settings from the checkpoint's step on, and says so; what cannot be applied is refused.

    The state of optimizers and schedules holds what they were made with, so Lightning would restore the old settings
    while `fit.yaml` names the new ones. Here moments and weights are restored, and rates are what the new settings
    give at this step: a schedule is run through from its beginning.

    Args:
        seed: Of the run, or false.
    """

    def __init__(self, seed: int | bool | None) -> None:
        self.seed = seed
        self.settings: dict[str, Any] = {}
        self.checkpoint: dict[str, Any] | None = None
        self.said: list[str] = []

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[KEY] = self.settings

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse what cannot be trained further, give EarlyStopping its own patience, and keep the rest for later."""
        if trainer.state.fn != "fit":
            return
        if "optimizer_states" not in checkpoint:
            raise UserError(
                f"{OPTION}: the checkpoint holds weights alone (save_weights_only), and no training to resume."
            )
        if 0 <= trainer.max_steps < (step := checkpoint["global_step"]):  # Lightning checks epochs
            raise UserError(
                f"{OPTION}: the checkpoint has come to step {step}, and `max_steps` is {trainer.max_steps}. Raise it, "
                "or give an earlier checkpoint."
            )
        self.checkpoint = checkpoint
        for callback in cast(Any, trainer).callbacks:
            state = checkpoint["callbacks"].get(callback.state_key) if isinstance(callback, EarlyStopping) else None
            if state is not None and state["patience"] != callback.patience:
                self.said.append(_sides("patience", state["patience"], callback.patience))
                state["patience"] = callback.patience

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare, now that optimizers are made and before their state is restored."""
        self.settings = ours = _settings(trainer, self.seed)
        checkpoint, self.checkpoint = self.checkpoint, None
        if checkpoint is None:
            return
        theirs = checkpoint.get(KEY, {**ours, "rates": None})  # a trainer of one's own has none to save
        _refuse(trainer, checkpoint, theirs["named"], ours["named"])
        self.said += _differences(theirs, ours)
        if theirs["rates"] != ours["rates"]:
            _run_through(trainer, checkpoint)
        if WEIGHTS in checkpoint and AVERAGE not in ours["named"]:
            pl_module.load_state_dict(checkpoint[WEIGHTS])
        if self.said:
            step = checkpoint["global_step"]
            say(f"--ckpt_path: from step {step} on, settings are other than before ({'; '.join(self.said)}).")


def _settings(trainer: Trainer, seed: int | bool | None) -> dict[str, Any]:
    """The settings of a training as JSON values: those that users name, and those that determine learning rates."""
    averages = [one for one in cast(Any, trainer).callbacks if isinstance(one, WeightAveraging)]
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    rates = [
        *({**one.defaults, **group, "params": 0} for one in trainer.optimizers for group in one.param_groups),
        *(one.state_dict() for one in schedulers),
    ]
    named = {name: value for one in rates for name, value in one.items() if name not in DERIVED and name[0] != "_"}
    for one in trainer.optimizers:  # rather than what a schedule has set for the first step
        named |= one.defaults
    named |= {
        "seed": seed,
        "optimizer": ", ".join(type(one).__name__ for one in trainer.optimizers),
        "lr_scheduler": ", ".join(type(one).__name__ for one in schedulers) or "none",
    }
    if averages:
        named[AVERAGE] = getattr(averages[0], "decay", "on")

    def plain(value: Any) -> Any:
        return value.tolist() if isinstance(value, Tensor) else type(value).__name__

    return cast(dict[str, Any], json.loads(json.dumps({"named": named, "rates": rates}, default=plain)))


def _refuse(trainer: Trainer, checkpoint: dict[str, Any], theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Refuse settings that would make another training of it, and what an optimizer has kept of other tensors."""
    options = {"seed": "`seed_everything`", **dict.fromkeys(("optimizer", *SWITCHES), "`model.optimizer`")}
    for name, option in options.items():
        there, here = theirs.get(name), ours.get(name)
        if bool(there) != bool(here) if name in SWITCHES else there != here:
            raise UserError(
                f"{OPTION}: a training keeps its {name} ({option}: {there} in the checkpoint, {here} here). Give that "
                "of the checkpoint, or begin a new training."
            )
    for optimizer, state in zip(trainer.optimizers, checkpoint["optimizer_states"], strict=True):
        groups = (state["param_groups"], optimizer.param_groups)
        trained, here = (sum(len(group["params"]) for group in one) for one in groups)
        if trained != here:
            raise UserError(
                f"{OPTION}: {trained} tensors were trained in the checkpoint, and {here} are here. Give the model's "
                "options that it was trained with (such as `adapt.train`), or begin a new training."
            )


def _differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    there, here = ({AVERAGE: "none", **one["named"]} for one in (theirs, ours))
    same = theirs["rates"] == ours["rates"]
    found = [
        _sides(name, there[name], value) + (", which the schedule does not heed" if same and name != AVERAGE else "")
        for name, value in sorted(here.items(), key=lambda item: item[0] != "lr_scheduler")  # from which others follow
        if name in there and there[name] != value
    ]
    return found or (["the schedule"] if theirs["rates"] and not same else [])


def _sides(name: str, there: Any, here: Any) -> str:
    return f"{name}: {there} in the checkpoint, {here} here"


def _run_through(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Put into a checkpoint the rates and schedules that the present settings give at its step."""
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: no optimizer has made a step
        try:
            for scheduler in schedulers:
                for _ in range(checkpoint["global_step"]):
                    scheduler.step()
        except ValueError as error:  # of OneCycleLR
            raise UserError(
                f"{OPTION}: the checkpoint is of step {checkpoint['global_step']}, and `model.lr_scheduler` ends "
                "before it. Give it more steps (total_steps), or null."
            ) from error
    checkpoint["lr_schedulers"] = [scheduler.state_dict() for scheduler in schedulers]
    for optimizer, state in zip(trainer.optimizers, checkpoint["optimizer_states"], strict=True):
        groups = zip(state["param_groups"], optimizer.param_groups, strict=True)
        state["param_groups"] = [{**ours, "params": theirs["params"]} for theirs, ours in groups]
