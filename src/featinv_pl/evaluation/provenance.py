"""Where scores come from: command, checkpoint, model, sampling, code and data."""

from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from lightning.pytorch import Trainer
from typing_extensions import TypedDict  # that of Python 3.11 is too old for pydantic

from featinv_pl.evaluation.methods import INVERSION
from featinv_pl.runtime.saving import provenance
from featinv_pl.sampling.sampler import Sampler


class Checkpoint(TypedDict):
    """The control that was scored, and the digest of its weights."""

    path: str | None
    step: int
    digest: str


class Provenance(TypedDict):
    """Where scores come from."""

    command: str
    date: str
    checkpoint: Checkpoint
    model: dict[str, Any]
    """The identity of the inverter."""
    sampling: dict[str, Any]
    code: dict[str, Any]
    shards: dict[str, str]


def describe(trainer: Trainer, module: Any, samplers: Mapping[str, Sampler], sampling: Mapping[str, Any]) -> Provenance:
    """Describe an evaluation of a `FeatureInversion` that begins, with further samplers and what `sampling` says."""
    how, origin = dict(sampling), provenance(trainer)
    used = {name: asdict(sampler) for name, sampler in {INVERSION: module.inverter.sampler, **samplers}.items()}
    return {
        "command": str(trainer.state.fn.value) if trainer.state.fn else "",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "checkpoint": {
            "path": None if trainer.ckpt_path is None else str(trainer.ckpt_path),
            "step": trainer.global_step or module.loaded_step,
            "digest": how.pop("control"),
        },
        "model": module.inverter.identity(),
        "sampling": {**how, "samplers": used},
        "code": origin["code"],
        "shards": origin["shards"],
    }
