"""Model folders from trained runs, and from the authors' checkpoints."""

import logging
import shlex
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featinv_pl.errors import UserError
from featinv_pl.evaluation.results import CEILING, FLOOR, INVERSION, METRICS, Document, read_document
from featinv_pl.inverter.inverter import Inverter
from featinv_pl.inverter.model_folder import Facts, Measured
from featinv_pl.inverter.pipeline import FeatInvPipeline
from featinv_pl.inverter.runs import CONFIGURATION, Run
from featinv_pl.nets import ldm
from featinv_pl.nets.backbone import Backbone
from featinv_pl.nets.frozen import digest
from featinv_pl.nets.prior import Prior
from featinv_pl.nets.weights import read_checkpoint, read_weights
from featinv_pl.sampling.sampler import AUTHORS

HALF_PRECISION = 1e-3  # relative; what storing weights in fp16 or bf16 costs
SHOWN_SCORES = ("cosine", "agreement@1", "agreement@5", "fid")
logger = logging.getLogger("featinv_pl")


def export(run: Path, folder: Path, license: str | None = None) -> str:
    """Write the inverter of a run as a new model folder with a model card, and return a summary.

    The run is the folder of a `fit`, which holds `fit.yaml`, a checkpoint and, once tested, `metrics.json`; or one of
    several checkpoints in it. The card states the licence, an identifier of the hub, or that of a known prior.
    """
    _refuse_existing(folder)
    found = Run.find(run, "RUN")
    inverter = found.inverter("RUN")
    tested = _tested(found.home, found.checkpoint, digest(inverter.control))
    step = read_checkpoint(found.checkpoint, "RUN", map_location="meta")["global_step"]
    with found.as_saved("RUN"):
        recipe = _recipe(found.settings, step)
    return _write(inverter, folder, recipe, tested, license)


def import_official(
    checkpoint: Path,
    folder: Path,
    backbone: str,
    prior: str,
    weights: str = "pretrained",
    input_size: int | None = None,
    image_size: int = 256,
) -> str:
    """Write the authors' trained half as a new model folder, and return a summary.

    Their checkpoint holds `control_model.*`, `model.diffusion_model.*` and `first_stage_model.*`; the prior must be the
    one that it was trained on. The other arguments are as in `FeatureInversion`.
    """
    _refuse_existing(folder)
    state = read_weights(checkpoint, "CKPT")
    for part, count in Counter(name.partition(".")[0] for name in state if "." in name).items():
        logger.info(f"{checkpoint.name}: {part}, {count} tensors")
    option = f"CKPT '{checkpoint}'"
    classifier = Backbone(backbone, weights, input_size=input_size)
    inverter = Inverter(classifier, Prior(prior), image_size=image_size, sampler=AUTHORS)
    heads = inverter.prior.unet.config.attention_head_dim
    for name, ours, theirs in (
        ("UNet", inverter.prior.unet, ldm.unet(state, option, heads)),
        ("autoencoder", inverter.prior.autoencoder.vae, ldm.autoencoder(state, option)),
    ):
        difference = ldm.largest_difference(ours, theirs)
        if not difference <= HALF_PRECISION:
            raise UserError(
                f"`prior`: the {name} of '{prior}' is not the one in '{checkpoint}' (a tensor differs by "
                f"{difference:.2g} of its norm). Give the prior that the checkpoint was trained on."
            )
        logger.info(f"{name}: that of the prior '{prior}' (largest relative difference of a tensor: {difference:.2g})")
    ldm.load_control(inverter.control, state, option)
    widths = [inverter.control.encoder.config[f"{part}_channels"] for part in ("in", "hidden", "out")]
    logger.info(f"ControlNet, with a feature encoder of {' -> '.join(map(str, widths))} channels: imported")
    return _write(inverter, folder, {"Origin": f"imported from the authors' checkpoint `{checkpoint.name}`"})


def _refuse_existing(folder: Path) -> None:
    if folder.exists():
        raise UserError(f"OUT: '{folder}' exists, and is left as it is. Choose a new folder.")


def _tested(home: Path, checkpoint: Path, weights: str) -> Document | None:
    """The scores of the exported weights, given by their digest; without them, None and advice in the log."""
    reason = "has no scores"
    if (home / METRICS).is_file():
        document = read_document(home / METRICS, "RUN")
        tested = document["provenance"]["checkpoint"]
        if tested["digest"] == weights:
            return document
        reason = f"has the scores of other weights (step {tested['step']}, {tested['digest'][:8]})"
    last = home / "test.yaml"
    command = ["featinv-pl", "test", "--config", last if last.is_file() else home / CONFIGURATION]
    command += ["--trainer.default_root_dir", home, "--ckpt_path", checkpoint]
    logger.warning(
        f"The model card has no scores: '{home}' {reason}, and '{checkpoint}' holds {weights[:8]}. To measure them, "
        f"run `{shlex.join(map(str, command))}` and export again."
    )
    return None


def _recipe(settings: dict[str, Any], steps: int) -> dict[str, str]:
    """The training, for the model card."""
    model, data = settings["model"]["init_args"], (settings.get("data") or {}).get("init_args", {})
    objective = model.get("objective", model)  # older runs have its options among the model's
    optimizer = model["optimizer"]
    if isinstance(optimizer, dict):
        options = optimizer.get("init_args", {})
        shown = [f"{name} {options[name]}" for name in ("lr", "betas", "weight_decay") if name in options]
        optimizer = ", ".join([optimizer["class_path"], *shown])
    return {
        "Shard set": "/".join(Path(str(data.get("train"))).parts[-2:]),  # without the folders of a disk
        "Steps": str(steps),
        "Batch size": str(data.get("batch_size")),
        "Seed": str(settings.get("seed_everything")),
        "Optimizer": optimizer,
        "Dropout of map and prompt": str(objective.get("dropout")),
        "Weighting of timesteps": str(objective.get("weighting")),
        "Auxiliary regression": str(objective.get("regression")),
        "Precision": str(settings["trainer"]["precision"] or "32-true"),
    }


def _write(
    inverter: Inverter,
    folder: Path,
    recipe: dict[str, str],
    tested: Document | None = None,
    license: str | None = None,
) -> str:
    """Write the folder atomically, and return a summary."""
    facts = Facts(recipe, license=license)
    if tested:
        date = tested["provenance"]["date"].partition("T")[0]
        facts = Facts(recipe, _measured(tested), date, tested["notes"], license)
    FeatInvPipeline(inverter).save_pretrained(folder, facts)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return f"{folder} ({size / 1e6:.1f} MB)"


def _measured(tested: Document) -> list[Measured]:
    """The scores of a model card, of complete test sets."""

    def of(test_set: str, method: str, score: str) -> Mapping[str, Any]:
        return tested["scores"][test_set].get(method, {}).get(score) or {}

    found = []
    for test_set in sorted(name for name in tested["scores"] if "/" not in name):
        for score in SHOWN_SCORES:
            if ours := of(test_set, INVERSION, score):
                interval = (ours["low"], ours["high"]) if "low" in ours else None
                floor, ceiling = (of(test_set, method, score).get("value") for method in (FLOOR, CEILING))
                images = tested["samples"][test_set]
                found.append(Measured(test_set, images, score, ours["value"], interval, floor, ceiling))
    return found
