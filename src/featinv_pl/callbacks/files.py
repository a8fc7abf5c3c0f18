"""Files that a run leaves: its configuration, and the parts it has trained."""

import os
import shutil
from pathlib import Path
from typing import Any, cast

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback

from featinv_pl.callbacks.provenance import provenance
from featinv_pl.data.manifests import write_file
from featinv_pl.errors import UserError

SAVED = ("config.json", "prompts.safetensors")


class SaveConfig(SaveConfigCallback):
    """Writes `<default_root_dir>/<stage>.yaml`, and hands the configuration to the loggers once.

    Beside it these get what it does not say: version and git state of the code, and digests of the shards.
    Paths below the user's home are written `~/...` there, for what is logged may be seen by others.

    Lightning's own would write into the loggers' folder, which runs share, and before anything has
    been checked: a run that is refused must not overwrite the configuration of one that was not.
    """

    def __init__(self, parser: LightningArgumentParser, config: Any) -> None:
        super().__init__(parser, config, save_to_log_dir=False)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Too early."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, now that model and data have been accepted."""
        self.save_config(trainer, pl_module, "fit")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, unless this is within `fit`."""
        if trainer.state.fn == "validate":
            self.save_config(trainer, pl_module, "validate")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save."""
        self.save_config(trainer, pl_module, "test")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save."""
        self.save_config(trainer, pl_module, "predict")

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file and tell the loggers."""
        if trainer.is_global_zero:
            text = self.parser.dump(self.config, skip_none=False)
            write_bytes(Path(trainer.default_root_dir) / f"{stage}.yaml", text.encode())
            shown = _without_home({**yaml.safe_load(text), **provenance(trainer)})
            for logger in trainer.loggers:
                logger.log_hyperparams(shown)


class SavePretrained(Callback):
    """Saves a trained part at the end of `fit`, in the layout in which it is loaded.

    Args:
        folder: Where to. What is there is replaced when the new one is whole.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse, before training, a folder that holds something else: replacing it would lose that."""
        saved = any((self.folder / name).is_file() for name in SAVED)
        empty = self.folder.is_dir() and not any(self.folder.iterdir())
        if self.folder.exists() and not saved and not empty:
            raise UserError(
                f"--trainer.callbacks.folder: '{self.folder}' exists and is no saved model, so it is left as it is. "
                "Choose a new folder for SavePretrained."
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save beside, then swap."""
        if not trainer.is_global_zero:
            return
        partial = self.folder.with_name(self.folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        cast(Any, pl_module).save_pretrained(partial)
        shutil.rmtree(self.folder, ignore_errors=True)
        os.replace(partial, self.folder)


def _without_home(settings: Any) -> Any:
    """Settings in which the user's home folder is called `~`."""
    if isinstance(settings, dict):
        return {_without_home(key): _without_home(value) for key, value in settings.items()}
    if isinstance(settings, list):
        return [_without_home(value) for value in settings]
    if isinstance(settings, str) and Path(settings).is_relative_to(Path.home()):
        return str(Path("~", Path(settings).relative_to(Path.home())))
    return settings


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file that is either whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, data)
