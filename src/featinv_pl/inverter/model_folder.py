"""Model folders: a trained inverter as files that can be published."""

import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # that of Python 3.11 is too old for pydantic

from featinv_pl.errors import UserError
from featinv_pl.inverter.identity import differences
from featinv_pl.inverter.inverter import Inverter
from featinv_pl.nets.backbone import Backbone
from featinv_pl.nets.control import Encoder
from featinv_pl.nets.hub import INDEX, check_sums, find_folder, read_index, write_sums
from featinv_pl.nets.prior import Prior
from featinv_pl.sampling.sampler import Sampler

CLASSIFIER, PRIOR = "backbone", "prior"
OPTION = "`model`"
Side = Annotated[int, Field(ge=8, le=4096)]  # of an image, in pixels


class Index(TypedDict):
    """The entries of `model_index.json` from which a model is loaded."""

    layer: str
    input_size: Side
    image_size: Side
    conditioning: Literal["spatial", "pooled"]
    hidden_channels: Annotated[int, Field(ge=1, le=100_000)]
    num_layers: Annotated[int, Field(ge=2, le=100)]
    backbone: str
    prior: str
    sampler: dict[str, Any]
    digests: dict[str, str]


def load_inverter(source: str | Path) -> Inverter:
    """Load a model folder, as `featinv-pl export` and `import` write it, or its name on the hub, on the CPU.

    Raises:
        UserError: Files are missing or damaged, or the frozen parts are not those of the training.
    """
    folder = find_folder(str(source), ["*"], OPTION)
    contents = read_index(folder, OPTION)
    try:
        index = TypeAdapter(Index).validate_python(contents)
        sampler = Sampler.from_fields(index["sampler"])
    except ValidationError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{OPTION}: '{folder / INDEX}' is damaged ({reason}). Export the model again.") from error
    # Parts that came from a disk are in the folder; those of the hub are named.
    classifier, prior = (
        str(folder / name) if (folder / name).is_dir() else named
        for name, named in ((CLASSIFIER, index["backbone"]), (PRIOR, index["prior"]))
    )
    inverter = Inverter(
        Backbone(classifier, layer=index["layer"], input_size=index["input_size"]),
        Prior(prior),
        Encoder(index["hidden_channels"], index["num_layers"]),
        index["image_size"],
        index["conditioning"],
        sampler,
    )
    check_sums(folder, OPTION)
    inverter.control.load_pretrained(folder, OPTION)
    if different := differences({**contents, **index["digests"]}, inverter.identity()):
        raise UserError(
            f"{OPTION}: the frozen parts of '{folder}' are not those that its control was trained with "
            f"({'; '.join(different)}). Copy the folder again, or export the model again."
        )
    return inverter.eval()


def save_inverter(inverter: Inverter, folder: Path) -> None:
    """Write a new folder: `encoder/`, `controlnet/`, `model_index.json`, frozen parts of this disk, and sums."""
    folder.mkdir(parents=True)
    inverter.control.save_pretrained(folder)
    classifier, prior = inverter.classifier, inverter.prior
    if Path(classifier.name).exists() or classifier.weights != "pretrained":
        classifier.save_pretrained(folder / CLASSIFIER)
    if Path(prior.source).exists():
        prior.save_pretrained(folder / PRIOR)
    (folder / INDEX).write_text(json.dumps(model_index(inverter), indent=2) + "\n")
    write_sums(folder)


def model_index(inverter: Inverter) -> dict[str, Any]:
    """The content of `model_index.json`: all that `load_inverter` needs besides weights."""
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
