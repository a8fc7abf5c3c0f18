"""Settings that have changed since the checkpoint from which a training resumes."""

import copy
import json
import warnings
from collections import defaultdict
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, WeightAveraging
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from featinv_pl.errors import UserError
from featinv_pl.runtime.checkpoints import OPTION
from featinv_pl.runtime.clipping import trained
from featinv_pl.runtime.ranks import say

KEY = "settings"  # of a checkpoint
WEIGHTS = "current_model_state"  # of one whose `state_dict` is a moving average
AVERAGE = "moving average"
DERIVED = ("params", "initial_lr", "min_lr", "base_lrs", "last_epoch")
UNHEEDED = ", which the schedule does not heed"


class Changes(Callback):
    """Applies changed settings from the checkpoint's step on, and says so; what cannot be applied is refused.

    The state of optimizers and schedules holds what they were made with, so Lightning would restore the old settings
    while `fit.yaml` names the new ones. Here moments and weights are restored, and rates are what the new settings
    give at this step: a schedule is run through from its beginning.

    Args:
        seed: That of the run, or false if it has none.
    """

    def __init__(self, seed: int | bool | None) -> None:
        self.seed = seed
        self.settings: dict[str, Any] = {}
        self.checkpoint: dict[str, Any] | None = None
        self.said: list[str] = []

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[KEY] = self.settings

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Give EarlyStopping its own patience, and keep the rest until optimizers are made.

        Raises:
            UserError: The checkpoint holds weights alone, or training would be over before it began.
        """
        if trainer.state.fn != "fit":
            return
        if "optimizer_states" not in checkpoint:
            raise UserError(
                f"{OPTION}: the checkpoint holds weights alone (save_weights_only), and no training to resume."
            )
        for unit, limit, reached in (
            ("step", trainer.max_steps, checkpoint["global_step"]),
            ("epoch", trainer.max_epochs, checkpoint["epoch"]),
        ):
            if limit is not None and 0 <= limit < reached:
                raise UserError(
                    f"{OPTION}: the checkpoint has come to {unit} {reached}, and `max_{unit}s` is {limit}. Raise it, "
                    "or give an earlier checkpoint."
                )
        self.checkpoint = checkpoint
        for callback in cast(Any, trainer).callbacks:
            state = checkpoint["callbacks"].get(callback.state_key) if isinstance(callback, EarlyStopping) else None
            if state is not None and state["patience"] != callback.patience:
                self.said.append(_sides("patience", state["patience"], callback.patience))
                state["patience"] = callback.patience

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare, now that optimizers are made and before their state is restored.

        Raises:
            UserError: A change cannot be applied.
        """
        self.settings = ours = _settings(trainer, self.seed)
        checkpoint, self.checkpoint = self.checkpoint, None
        if checkpoint is None:
            return
        shown = {AVERAGE: ours["named"].get(AVERAGE, "on")} if WEIGHTS in checkpoint else {}
        theirs = checkpoint.get(KEY) or {"named": shown, "rates": None}  # one of before names no settings
        _refuse_others(theirs["named"], ours["named"])
        for optimizer, state in zip(trainer.optimizers, checkpoint["optimizer_states"], strict=True):
            _refuse_state(optimizer, state, changed=theirs["named"] != ours["named"])
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
    plain: dict[str, Any] = json.loads(json.dumps({"named": named, "rates": rates}, default=_plain))
    return plain


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else type(value).__name__


def _refuse_others(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Refuse settings that would make another training of it."""
    for name, option in (("seed", "`seed_everything`"), ("optimizer", "`model.optimizer`")):
        if theirs.get(name, ours[name]) != ours[name]:
            raise UserError(
                f"{OPTION}: a training keeps its {name} ({option}: {theirs[name]} in the checkpoint, {ours[name]} "
                "here). Give that of the checkpoint, or begin a new training."
            )


def _refuse_state(optimizer: Optimizer, state: dict[str, Any], changed: bool) -> None:
    """Refuse what an optimizer has kept of other tensors, or by other rules if its arguments have changed."""
    theirs, ours = ([len(group["params"]) for group in one] for one in (state["param_groups"], optimizer.param_groups))
    if theirs != ours:
        raise UserError(
            f"{OPTION}: {sum(theirs)} tensors were trained in the checkpoint, and {sum(ours)} are here. Give the "
            "model's options that it was trained with (such as `adapt.train`), or begin a new training."
        )
    number, kept = next(iter(state["state"].items()), (0, {}))
    needed = _kept(optimizer, trained(optimizer)[number]) if changed and kept else set(kept)
    if needed != set(kept):
        raise UserError(
            f"{OPTION}: the optimizer as it is configured here keeps {', '.join(sorted(needed)) or 'nothing'} of each "
            f"tensor, and the checkpoint has {', '.join(sorted(kept))}. Give the `model.optimizer` that it was trained "
            "with, or begin a new training."
        )


def _kept(optimizer: Optimizer, tensor: Tensor) -> set[str]:
    """The names of an optimizer's state of a tensor, from a step of a copy on zeros: they may depend on its shape."""
    zeros = Parameter(torch.zeros_like(tensor))
    zeros.grad = torch.zeros_like(tensor)
    other = copy.copy(optimizer)
    other.param_groups = [{**optimizer.param_groups[0], "params": [zeros]}]
    other.state = defaultdict(dict)
    other.step()
    return set(other.state[zeros])


def _differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """The changed settings, for a message."""
    there, here = ({AVERAGE: "none", **one["named"]} for one in (theirs, ours))
    same = theirs["rates"] == ours["rates"]
    found = [
        _sides(name, there[name], value) + (UNHEEDED if same and name != AVERAGE else "")
        for name, value in sorted(here.items(), key=lambda item: item[0] != "lr_scheduler")  # from which others follow
        if name in there and there[name] != value
    ]
    return found or (["the schedule"] if not same and theirs["rates"] else [])


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
