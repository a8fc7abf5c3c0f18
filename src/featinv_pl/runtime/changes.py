"""What a training does with settings that have changed since the checkpoint that it continues from."""

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
from featinv_pl.runtime.checkpoints import OPTION, say
from featinv_pl.runtime.clipping import trained

KEY = "training"  # of a checkpoint
WEIGHTS = "current_model_state"  # of one whose `state_dict` is a moving average
DERIVED = ("initial_lr", "min_lr", "base_lrs", "last_epoch")
SCHEDULED = ("lr", "betas", "momentum")  # what a schedule may set at each step


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
        """Note what is compared with the settings of a training that continues."""
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
                f"{OPTION}: the checkpoint holds weights alone (save_weights_only), and no training to continue."
            )
        _refuse_past(trainer, checkpoint)
        self.checkpoint = checkpoint
        for callback in cast(Any, trainer).callbacks:
            state = checkpoint["callbacks"].get(callback.state_key) if isinstance(callback, EarlyStopping) else None
            if state is not None and state["patience"] != callback.patience:
                self.said.append(f"patience: {state['patience']} in the checkpoint, {callback.patience} here")
                state["patience"] = callback.patience

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare, now that optimizers are made and before their state is restored.

        Raises:
            UserError: A change cannot be applied.
        """
        self.settings = _settings(trainer, self.seed)
        checkpoint, self.checkpoint = self.checkpoint, None
        if checkpoint is None:
            return
        theirs = checkpoint.get(KEY) or _known(checkpoint, self.settings)
        _refuse_changes(trainer, checkpoint, theirs, self.settings)
        self.said += _differences(theirs, self.settings)
        if any(theirs[part] != self.settings[part] for part in ("groups", "schedules", "schedule")):
            _run_through(trainer, checkpoint)
        if WEIGHTS in checkpoint and self.settings["average"] is None:
            pl_module.load_state_dict(checkpoint[WEIGHTS])
        if self.said:
            step = checkpoint["global_step"]
            say(f"{OPTION}: from step {step} on, settings are other than before ({'; '.join(self.said)}).")


def _settings(trainer: Trainer, seed: int | bool | None) -> dict[str, Any]:
    """What a training was begun with, as plain values."""
    averages = [one for one in cast(Any, trainer).callbacks if isinstance(one, WeightAveraging)]
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    settings = {
        "seed": seed,
        "optimizers": [type(one).__name__ for one in trainer.optimizers],
        "arguments": [one.defaults for one in trainer.optimizers],
        "groups": [_arguments(group) for one in trainer.optimizers for group in one.param_groups],
        "schedules": [type(one).__name__ for one in schedulers],
        "schedule": [one.state_dict() for one in schedulers],
        "average": getattr(averages[0], "decay", "on") if averages else None,
    }
    known: dict[str, Any] = _as_json(settings)
    return known


def _as_json(settings: Any) -> Any:
    return json.loads(json.dumps(settings, default=_plain))


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else type(value).__name__


def _arguments(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def _known(checkpoint: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """The settings of a checkpoint of before, which names none: taken for ours, but for what it shows."""
    theirs = copy.deepcopy(ours)
    if len(checkpoint["lr_schedulers"]) != len(ours["schedules"]):
        theirs["schedules"] = ["a schedule"] * len(checkpoint["lr_schedulers"])
    if (WEIGHTS in checkpoint) != (ours["average"] is not None):
        theirs["average"] = "on" if WEIGHTS in checkpoint else None
    groups = [group for state in checkpoint["optimizer_states"] for group in state["param_groups"]]
    moved = SCHEDULED if checkpoint["lr_schedulers"] else ()
    for part in ("arguments", "groups"):
        for there, shown in zip(theirs[part], _as_json(groups), strict=False):
            there |= {name: value for name, value in shown.items() if name in there and name not in moved}
    return theirs


def _refuse_past(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    for name, limit, reached in (
        ("max_steps", trainer.max_steps, checkpoint["global_step"]),
        ("max_epochs", trainer.max_epochs, checkpoint["epoch"]),
    ):
        if limit is not None and 0 <= limit < reached:
            raise UserError(
                f"{OPTION}: the checkpoint has come to {name.removeprefix('max_').removesuffix('s')} {reached}, and "
                f"--trainer.{name} is {limit}. Raise it, or give an earlier checkpoint."
            )


def _refuse_changes(trainer: Trainer, checkpoint: dict[str, Any], theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Refuse what would make another training of it."""
    for name, option in (("seed", "--seed_everything"), ("optimizers", "--model.optimizer")):
        if theirs[name] != ours[name]:
            raise UserError(
                f"{OPTION}: a training keeps its {name.removesuffix('s')} ({option}: {_shown(theirs[name])} in the "
                f"checkpoint, {_shown(ours[name])} here). Give that of the checkpoint, or begin a new training."
            )
    changed = theirs["arguments"] != ours["arguments"]
    for optimizer, state in zip(trainer.optimizers, checkpoint["optimizer_states"], strict=True):
        sizes = [
            [len(group["params"]) for group in groups] for groups in (state["param_groups"], optimizer.param_groups)
        ]
        if sizes[0] != sizes[1]:
            raise UserError(
                f"{OPTION}: {sum(sizes[0])} tensors were trained in the checkpoint, and {sum(sizes[1])} are here. "
                "Give the model's options that it was trained with (such as `adapt.train`), or begin a new training."
            )
        number, remembered = next(iter(state["state"].items()), (0, {}))
        needed = _remembered(optimizer, trained(optimizer)[number]) if changed and remembered else set(remembered)
        if needed != set(remembered):
            raise UserError(
                f"{OPTION}: the optimizer as it is configured here remembers {', '.join(sorted(needed)) or 'nothing'} "
                f"of each tensor, and the checkpoint has {', '.join(sorted(remembered))}. Give the --model.optimizer "
                "that it was trained with, or begin a new training."
            )


def _remembered(optimizer: Optimizer, tensor: Tensor) -> set[str]:
    """What an optimizer keeps of a tensor, which may depend on its shape, from a step of a copy on zeros."""
    zeros = Parameter(torch.zeros_like(tensor))
    zeros.grad = torch.zeros_like(tensor)
    other = copy.copy(optimizer)
    other.param_groups = [{**optimizer.param_groups[0], "params": [zeros]}]
    other.state = defaultdict(dict)
    other.step()
    return set(other.state[zeros])


def _differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """What has changed, for people: what follows from other changes is left out."""
    found = []
    if theirs["schedules"] != ours["schedules"]:
        found.append(_side("lr_scheduler", theirs["schedules"], ours["schedules"]))
    arguments = {name for one in ours["arguments"] for name in one}
    unheeded = "" if theirs["groups"] != ours["groups"] else ", which the schedule does not heed"
    for part, hidden, note in (("arguments", (), unheeded), ("groups", arguments, ""), ("schedule", (), "")):
        for there, here in zip(theirs[part], ours[part], strict=False):
            names = [name for name in here if name in there and not name.startswith("_")]
            shown = [name for name in names if name not in (*DERIVED, *hidden)]
            found += [_side(name, there[name], here[name]) + note for name in shown if there[name] != here[name]]
    if not found and any(theirs[part] != ours[part] for part in ("groups", "schedule")):
        found.append("the schedule")
    if theirs["average"] != ours["average"]:
        found.append(_side("moving average", theirs["average"], ours["average"]))
    return found


def _side(name: str, there: Any, here: Any) -> str:
    return f"{name}: {_shown(there)} in the checkpoint, {_shown(here)} here"


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else "none" if value is None else str(value)


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
                f"{OPTION}: the checkpoint is of step {checkpoint['global_step']}, and --model.lr_scheduler ends "
                "before it. Give it more steps (total_steps), or null."
            ) from error
    checkpoint["lr_schedulers"] = [scheduler.state_dict() for scheduler in schedulers]
    for optimizer, state in zip(trainer.optimizers, checkpoint["optimizer_states"], strict=True):
        state["param_groups"] = [
            {"params": theirs["params"], **_arguments(ours)}
            for theirs, ours in zip(state["param_groups"], optimizer.param_groups, strict=True)
        ]
