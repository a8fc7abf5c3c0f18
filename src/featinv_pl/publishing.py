"""Model folders from trained runs, and from the authors' checkpoints."""

import logging
import shlex
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, StrictUndefined
from pydantic import ValidationError

from featinv_pl.data.shards.manifest import one_line
from featinv_pl.errors import UserError
from featinv_pl.evaluation.results import INVERSION, METRICS, Document, read_document
from featinv_pl.files import atomic, read_yaml
from featinv_pl.inverter.identity import check_checkpoint, fill_control
from featinv_pl.inverter.inverter import Inverter
from featinv_pl.inverter.pipeline import FeatInvPipeline
from featinv_pl.nets import ldm
from featinv_pl.nets.autoencoder import LatentAutoencoder
from featinv_pl.nets.backbone import Backbone
from featinv_pl.nets.control import Encoder
from featinv_pl.nets.frozen import digest
from featinv_pl.nets.prior import Prior
from featinv_pl.nets.weights import read_checkpoint, read_weights
from featinv_pl.sampling.sampler import AUTHORS, Sampler

CONFIGURATION = "fit.yaml"
HALF_PRECISION = 1e-3  # relative; what storing weights in fp16 or bf16 costs
SHOWN_SCORES = ("cosine", "agreement@1", "agreement@5", "fid")
logger = logging.getLogger("featinv_pl")


def export(run: Path, folder: Path) -> str:
    """Write the inverter of a run as a new model folder with a model card, and return a summary.

    The run is the folder of a `fit`, which holds `fit.yaml`, a checkpoint and, once tested, `metrics.json`; or one of
    several checkpoints in it.
    """
    _refuse_existing(folder)
    checkpoint = run if run.is_file() else _only_checkpoint(run)
    home = next((parent for parent in checkpoint.parents if (parent / CONFIGURATION).is_file()), None)
    if home is None:
        raise UserError(f"RUN: no {CONFIGURATION} beside or above '{checkpoint}'. Give a run of `featinv-pl fit`.")
    state = read_checkpoint(checkpoint, "RUN")
    settings = read_yaml(home / CONFIGURATION, "RUN", "Give a run of `featinv-pl fit`.")
    try:
        recipe, (seed, backbone, prior, preview, parts) = _recipe(settings, state["global_step"]), _parts(settings)
    except (ValidationError, LookupError, TypeError, AttributeError) as error:  # of a file that was edited
        raise UserError(
            f"RUN: '{home / CONFIGURATION}' does not configure a FeatureInversion as `fit` saves one "
            f"({type(error).__name__}: {one_line(error)}). Give a run of `featinv-pl fit`."
        ) from error
    if type(seed) is int:  # that of random weights of a classifier
        torch.manual_seed(seed)
    decoder = LatentAutoencoder.load(preview, "RUN") if preview else None
    inverter = Inverter(Backbone(*backbone), Prior(prior), *parts, preview=decoder)
    check_checkpoint(state, inverter, f"RUN: '{checkpoint}'")
    fill_control(inverter, state["state_dict"], f"RUN: '{checkpoint}'")
    tested = _tested(home, checkpoint, digest(inverter.control))
    return _write(inverter, folder, recipe, tested)


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


def _only_checkpoint(run: Path) -> Path:
    found = sorted(run.rglob("*.ckpt"))
    if not found:
        raise UserError(f"RUN: '{run}' holds no checkpoint. Give a run of `featinv-pl fit`.")
    if len(found) > 1:
        names = ", ".join(map(str, found))
        raise UserError(f"RUN: '{run}' holds {len(found)} checkpoints: {names}. Give the one to export as RUN.")
    return found[0]


def _parts(settings: Any) -> tuple[Any, list[Any], str, str | None, tuple[Encoder, int, Any, Sampler]]:
    """Seed, classifier, prior, preview decoder and further arguments of the inverter of a saved configuration."""
    if not settings["model"]["class_path"].endswith(".FeatureInversion"):
        raise TypeError(f"model: {settings['model']['class_path']}")
    options = settings["model"]["init_args"]
    older = {name: options[name] for name in ("hidden_channels", "num_layers") if name in options}
    encoder, sampler = Encoder(**options.get("encoder", older)), Sampler.from_fields(options["sampler"])
    classifier = [options[name] for name in ("backbone", "weights", "layer", "input_size")]
    others = encoder, options["image_size"], options["conditioning"], sampler
    return settings["seed_everything"], classifier, options["prior"], options.get("preview_decoder"), others


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
    model, data = settings["model"]["init_args"], settings.get("data") or {}
    objective = model.get("objective", model)  # older runs have its options among the model's
    optimizer = model["optimizer"]
    if isinstance(optimizer, dict):
        options = optimizer.get("init_args", {})
        shown = [f"{name} {options[name]}" for name in ("lr", "betas", "weight_decay") if name in options]
        optimizer = ", ".join([optimizer["class_path"], *shown])
    return {
        "Steps": str(steps),
        "Batch size": str(data.get("init_args", {}).get("batch_size")),
        "Optimizer": optimizer,
        "Dropout of map and prompt": str(objective.get("dropout")),
        "Min-SNR weights, cut at": str(objective.get("min_snr_gamma")),
        "Precision": str(settings["trainer"]["precision"] or "32-true"),
    }


def _write(inverter: Inverter, folder: Path, recipe: dict[str, str], tested: Document | None = None) -> str:
    found = tested["scores"] if tested else {}
    table = {one: found[one][INVERSION] for one in sorted(found) if "/" not in one}
    names = [name for name in SHOWN_SCORES if any(name in scores for scores in table.values())]
    pipeline = FeatInvPipeline(inverter)
    template = Environment(undefined=StrictUndefined, trim_blocks=True).from_string(
        files("featinv_pl.inverter").joinpath("model_card.md").read_text()
    )
    card = template.render(
        name=folder.name,
        index=pipeline.index(),
        shape="x".join(map(str, inverter.classifier.feature_shape)),
        recipe=recipe,
        names=names,
        scores={
            one: [scores[name]["value"] if name in scores else None for name in names] for one, scores in table.items()
        },
        notes=tested["notes"] if tested else [],
    )
    with atomic(folder) as partial:
        pipeline.save_pretrained(partial)
        (partial / "README.md").write_text(card)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return f"{folder}: {size / 1e6:.1f} MB. Try it: featinv-pl reconstruct --model {folder} IMAGE --out DIR"
