"""Model folders: an inverter as files that can be published, with a card that says what they are."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined
from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # that of Python 3.11 is too old for pydantic

from featinv_pl.errors import UserError
from featinv_pl.inverter.identity import differences
from featinv_pl.inverter.inverter import Inverter
from featinv_pl.nets.autoencoder import LatentAutoencoder
from featinv_pl.nets.backbone import Backbone
from featinv_pl.nets.control import PARTS, Encoder
from featinv_pl.nets.frozen import digest
from featinv_pl.nets.hub import INDEX, SUMS, check_sums, read_index, write_sums
from featinv_pl.nets.prior import Prior
from featinv_pl.sampling.sampler import Sampler

CLASSIFIER, PRIOR, PREVIEW, CARD = "backbone", "prior", "preview", "README.md"
OPENRAIL, UNKNOWN = "creativeml-openrail-m", "unknown"  # as the hub calls them
TAGS = ["feature-inversion", "interpretability", "explainable-ai", "diffusion", "controlnet"]
# The control starts as a copy of the prior's encoder, so that the prior's licence binds it.
LICENCES = {
    "lambdalabs/miniSD-diffusers": OPENRAIL,
    "CompVis/stable-diffusion-v1-4": OPENRAIL,
    "stable-diffusion-v1-5/stable-diffusion-v1-5": OPENRAIL,
}
Side = Annotated[int, Field(ge=8, le=4096)]  # of an image, in pixels


class Index(TypedDict):
    """The entries of `model_index.json` from which a model is loaded."""

    backbone: str
    prior: str
    layer: str
    input_size: Side
    image_size: Side
    conditioning: Literal["spatial", "pooled"]
    hidden_channels: Annotated[int, Field(ge=1, le=100_000)]
    num_layers: Annotated[int, Field(ge=2, le=100)]
    sampler: dict[str, Any]
    digests: dict[str, str]


class Measured(NamedTuple):
    """A score in the model card, with its 95 % interval and those of another image and of the autoencoder alone."""

    test_set: str
    samples: int
    score: str
    value: float
    interval: tuple[float, float] | None
    floor: float | None
    ceiling: float | None


@dataclass(frozen=True)
class Facts:
    """What a model card says beyond the model itself.

    Attributes:
        recipe: How it was trained, by name.
        scores: What `test` measured.
        tested: When, as a date.
        notes: What is missing, and other notes of the test.
        license: An identifier of the hub; that of the prior if None.
    """

    recipe: dict[str, str] = field(default_factory=dict)
    scores: Sequence[Measured] = ()
    tested: str = ""
    notes: Sequence[str] = ()
    license: str | None = None


def read_model(folder: Path, option: str, classifier: Backbone | None = None) -> Inverter:
    """Load the inverter of a model folder, which `option` named; see `FeatInvPipeline.from_pretrained`."""
    contents = read_index(folder, option)
    try:
        index = TypeAdapter(Index).validate_python(contents)
        sampler = Sampler.from_fields(index["sampler"])
    except ValidationError as error:
        found = " ".join(str(error).split())[:300]
        raise UserError(f"{option}: '{folder / INDEX}' is damaged ({found}). Export the model again.") from error
    # Parts that came from a disk are in the folder; those of the hub are named.
    backbone, prior = (
        str(folder / name) if (folder / name).is_dir() else named
        for name, named in ((CLASSIFIER, index["backbone"]), (PRIOR, index["prior"]))
    )
    inverter = Inverter(
        classifier or Backbone(backbone, layer=index["layer"], input_size=index["input_size"]),
        Prior(prior),
        Encoder(index["hidden_channels"], index["num_layers"]),
        index["image_size"],
        index["conditioning"],
        sampler,
        LatentAutoencoder.load_folder(folder / PREVIEW, option) if (folder / PREVIEW).is_dir() else None,
    )
    check_sums(folder, option)
    if different := differences({**contents, **index["digests"]}, inverter.identity()):
        raise UserError(
            f"{option}: the frozen parts of '{folder}' are not those that its control was trained with "
            f"({'; '.join(different)}). Copy the folder again, or export the model again."
        )
    inverter.control.load_pretrained(folder, option)
    return inverter


def write_model(inverter: Inverter, folder: Path, name: str, facts: Facts, origin: Path | None = None) -> None:
    """Write a new folder: `encoder/`, `controlnet/`, `model_index.json`, frozen parts of this disk, sums and a card.

    `name` is that of the model. The card of `origin`, the folder that the inverter was read from, is kept if the
    control is still that one: it says how it was trained and what was measured.
    """
    folder.mkdir(parents=True)
    inverter.control.save_pretrained(folder)
    classifier, prior = inverter.classifier, inverter.prior
    if not classifier.network.published:
        classifier.save_pretrained(folder / CLASSIFIER)
    if Path(prior.source).exists():
        prior.save_pretrained(folder / PRIOR)
    if inverter.preview is not None:
        inverter.preview.vae.save_pretrained(folder / PREVIEW)
    (folder / INDEX).write_text(json.dumps(index_of(inverter), indent=2) + "\n")
    write_sums(folder)
    card = model_card(inverter, name, facts)
    if origin is not None and (origin / CARD).is_file() and _control_sums(origin) == _control_sums(folder):
        card = (origin / CARD).read_text()
    (folder / CARD).write_text(card)


def _control_sums(folder: Path) -> list[str]:
    """The lines of a folder's sums that are about the control's weights."""
    text = (folder / SUMS).read_text() if (folder / SUMS).is_file() else ""
    return [line for line in text.splitlines() if line.partition("  ")[2].startswith(PARTS)]


def index_of(inverter: Inverter) -> dict[str, Any]:
    """The content of `model_index.json`: all that `read_model` needs besides weights."""
    known = {name: value for name, value in inverter.identity().items() if name not in inverter.digests}
    return {
        "_class_name": "FeatInvPipeline",
        "_featinv_pl_version": version("featinv-pl"),
        CLASSIFIER: inverter.classifier.title,
        PRIOR: "/".join(Path(inverter.prior.source).parts[-2:]),
        **known,
        "sampler": asdict(inverter.sampler),
        "digests": inverter.digests,
    }


def model_card(inverter: Inverter, name: str, facts: Facts) -> str:
    """The card of a model: what it is, how it was trained, its scores between floor and ceiling, and its limits."""
    index, base_models = index_of(inverter), _base_models(inverter)
    license = facts.license or LICENCES.get(inverter.prior.source, UNKNOWN)
    data = ModelCardData(
        base_model=base_models or None,
        base_model_relation="adapter" if base_models else None,
        library_name="featinv-pl",
        license=license,
        pipeline_tag="image-to-image",
        tags=TAGS,
        model_name=name,
        eval_results=[
            EvalResult(
                "image-to-image", one.test_set, one.test_set, one.score, round(one.value, 4), task_name="Inversion"
            )
            for one in facts.scores
        ]
        or None,
    )
    template = Environment(undefined=StrictUndefined, trim_blocks=True).from_string(
        files("featinv_pl.inverter").joinpath("model_card.md").read_text()
    )
    return template.render(
        metadata=data.to_yaml(),
        name=name,
        index=index,
        shape="x".join(map(str, inverter.classifier.feature_shape)),
        base_models=base_models,
        license=None if license == UNKNOWN else license,
        digest=digest(inverter.control),
        facts=facts,
    )


def _base_models(inverter: Inverter) -> list[str]:
    """The names on the hub of the frozen parts that have one."""
    classifier, source = inverter.classifier, inverter.prior.source
    config: Any = getattr(classifier.model, "pretrained_cfg", None) or {}
    named = config.get("hf_hub_id") if classifier.network.published else None
    if classifier.name.startswith("hf/"):
        named = classifier.name.removeprefix("hf/")
    return [*([] if Path(source).exists() else [source]), *([str(named)] if named else [])]
