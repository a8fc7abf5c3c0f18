"""Trained runs: a checkpoint, and the configuration that lies beside it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from pydantic import ValidationError

from featinv_pl.errors import UserError
from featinv_pl.files import read_yaml
from featinv_pl.inverter.identity import check_checkpoint, fill_control
from featinv_pl.inverter.inverter import Inverter
from featinv_pl.nets.autoencoder import LatentAutoencoder
from featinv_pl.nets.backbone import Backbone
from featinv_pl.nets.control import Encoder
from featinv_pl.nets.prior import Prior
from featinv_pl.nets.weights import read_checkpoint
from featinv_pl.sampling.sampler import Sampler

CONFIGURATION, CHECKPOINTS = "fit.yaml", "*.ckpt"
ADVICE = "Give a run of `featinv-pl fit`."


class Run(NamedTuple):
    """A checkpoint, and the folder of its run with the settings of `fit`."""

    checkpoint: Path
    home: Path
    settings: dict[str, Any]

    @classmethod
    def find(cls, source: Path, option: str) -> Self:
        """The run of a folder or of one of its checkpoints; `option` named it.

        Raises:
            UserError: There is no checkpoint, or several, or no configuration of a FeatureInversion.
        """
        checkpoint = source if source.is_file() else _only_checkpoint(source, option)
        home = next((folder for folder in checkpoint.absolute().parents if (folder / CONFIGURATION).is_file()), None)
        if home is None:
            raise UserError(f"{option}: no {CONFIGURATION} beside or above '{checkpoint}'. {ADVICE}")
        home = next((folder for folder in checkpoint.parents if folder.absolute() == home), home)
        found = cls(checkpoint, home, read_yaml(home / CONFIGURATION, option, ADVICE))
        with found.as_saved(option):
            if not (path := found.settings["model"]["class_path"]).endswith(".FeatureInversion"):
                raise TypeError(f"model: {path}")
        return found

    @contextmanager
    def as_saved(self, option: str) -> Iterator[None]:
        """Explain what fails because the configuration was edited."""
        try:
            yield
        except (ValidationError, LookupError, TypeError, AttributeError) as error:
            raise UserError(
                f"{option}: '{self.home / CONFIGURATION}' does not configure a FeatureInversion as `fit` saves one "
                f"({type(error).__name__}: {' '.join(str(error).split())[:300]}). {ADVICE}"
            ) from error

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of the FeatureInversion, as they are written."""
        options: dict[str, Any] = self.settings["model"]["init_args"]
        return options

    def seed(self) -> None:
        """Seed as the run did, so that a classifier with random weights gets those of the run."""
        if type(seed := self.settings.get("seed_everything")) is int:
            torch.manual_seed(seed)

    def inverter(self, option: str, classifier: Backbone | None = None) -> Inverter:
        """Build the inverter, with the weights of the checkpoint; a classifier takes the place of the named one.

        Raises:
            UserError: The checkpoint is damaged, or belongs to another configuration.
        """
        options, what = self.options, f"{option}: '{self.checkpoint}'"
        state = read_checkpoint(self.checkpoint, option)
        older = {name: options[name] for name in ("hidden_channels", "num_layers") if name in options}
        with self.as_saved(option):
            encoder, sampler = Encoder(**options.get("encoder", older)), Sampler.from_fields(options["sampler"])
            named = [options[name] for name in ("backbone", "weights", "layer", "input_size")]
            prior, size, conditioning = (options[name] for name in ("prior", "image_size", "conditioning"))
        preview = options.get("preview_decoder")
        decoder = LatentAutoencoder.load(preview, option) if preview else None
        with torch.random.fork_rng(devices=[]):
            self.seed()
            inverter = Inverter(
                classifier or Backbone(*named), Prior(prior), encoder, size, conditioning, sampler, decoder
            )
        check_checkpoint(state, inverter, what)
        fill_control(inverter, state["state_dict"], what)
        return inverter


def is_run(source: Path) -> bool:
    """Whether a path is that of a checkpoint, or of a folder with a configuration or checkpoints in it."""
    return source.is_file() or (source / CONFIGURATION).is_file() or any(source.rglob(CHECKPOINTS))


def _only_checkpoint(folder: Path, option: str) -> Path:
    found = sorted(folder.rglob(CHECKPOINTS))
    if not found:
        raise UserError(f"{option}: '{folder}' holds no checkpoint. {ADVICE}")
    if len(found) > 1:
        names = ", ".join(map(str, found))
        raise UserError(f"{option}: '{folder}' holds {len(found)} checkpoints: {names}. Give one of them.")
    return found[0]
