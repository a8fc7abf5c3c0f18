"""The commands that look at feature spaces; libraries are imported by the one that needs them."""

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from featinv_pl.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from featinv_pl.explore.samples import Samples
    from featinv_pl.inverter.pipeline import FeatInvPipeline
    from featinv_pl.pages.page import Report

SIGNED = ("--strengths", "--box")  # whose values may begin with a minus
NUM_IMAGES = 2000


def _concepts(parser: ArgumentParser, args: list[str]) -> None:
    parser.add_argument("shards", metavar="SHARDS", type=Path, nargs="+", help="shard sets of one backbone and layer")
    parser.add_argument("--method", choices=("nmf", "difference", "cav"), default="nmf", help="(%(default)s)")
    parser.add_argument("--out", required=True, type=folder, help="the folder for concepts and examples")
    parser.add_argument("--num_concepts", type=positive, default=8, help="components of nmf (%(default)s)")
    parser.add_argument(
        "--between", metavar=("A", "B"), nargs=2, action="append", default=[],
        help="difference and cav: from class A to B, by label or folder; may be repeated. Without it, between two sets",
    )  # fmt: skip
    parser.add_argument("--pooled", action="store_true", help="difference and cav: the same direction at all locations")
    parser.add_argument("--num_images", type=positive, default=NUM_IMAGES, help="of each set at most (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of nmf (%(default)s)")
    options = parser.parse_args(args)
    from featinv_pl.explore.concepts import (
        activation_vectors,
        difference_concepts,
        nmf_concepts,
        pair_of_sets,
        pairs_of_labels,
    )
    from featinv_pl.explore.gallery import gallery
    from featinv_pl.explore.samples import read_samples

    samples = read_samples(options.shards, options.num_images, "SHARDS")
    if options.method == "nmf":
        found = nmf_concepts(samples, options.num_concepts, options.seed)
    else:
        pairs = pairs_of_labels(samples, options.between) if options.between else pair_of_sets(samples)
        find = difference_concepts if options.method == "difference" else activation_vectors
        found = find(samples, pairs, options.pooled)
    found.save(options.out)
    _finish(gallery(found, samples), options.out)


def _steer(parser: ArgumentParser, args: list[str]) -> None:
    _add_model(parser)
    parser.add_argument("image", metavar="IMAGE", type=Path)
    parser.add_argument("--concepts", required=True, type=Path, help="what `featinv-pl concepts` has written")
    parser.add_argument("--concept", default="0", help="its number or name (%(default)s)")
    parser.add_argument("--edit", choices=("add", "scale", "remove"), default="add", help="(%(default)s)")
    parser.add_argument(
        "--strengths", type=strengths, default=strengths("-2:2:9"), metavar="FROM:TO:COUNT",
        help="or single values between commas; of add: multiples of the direction; of scale: factors of what an NMF "
        "component contributes; of remove: shares of it (-2:2:9)",
    )  # fmt: skip
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--box", type=box, metavar="TOP,LEFT,HEIGHT,WIDTH", help="where, in pixels that the model sees")
    where.add_argument("--mask", type=Path, help="where: a picture of the size of IMAGE, white inside")
    parser.add_argument(
        "--class", dest="classes", type=int, action="append", default=[], help="whose probability to show"
    )
    _add_drawing(parser)
    options = _parse(parser, args)
    from featinv_pl.explore.concepts import Concepts
    from featinv_pl.explore.steering import steer
    from featinv_pl.pages.pictures import open_picture

    picture = open_picture(options.image)
    concepts = Concepts.load(options.concepts)
    concept = concepts.number(options.concept)
    pipeline = load_pipeline(options.model)
    steering = steer(
        pipeline, picture, concepts, concept, options.strengths, options.edit,
        _mask(options, pipeline), options.classes, options.num_samples, options.seed,
    )  # fmt: skip
    _finish(steering, options.out)


def _interpolate(parser: ArgumentParser, args: list[str]) -> None:
    _add_model(parser)
    parser.add_argument("first", metavar="A", type=Path)
    parser.add_argument("second", metavar="B", type=Path)
    parser.add_argument("--steps", type=positive, default=11, help="ends included (%(default)s)")
    parser.add_argument("--mode", choices=("linear", "slerp"), default="linear", help="slerp keeps norms (%(default)s)")
    parser.add_argument("--real", type=Path, help="a shard set of real images, to flag steps that leave their range")
    parser.add_argument("--num_images", type=positive, default=NUM_IMAGES, help="of --real at most (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (%(default)s)")
    options = parser.parse_args(args)
    from featinv_pl.explore.interpolation import interpolate
    from featinv_pl.pages.pictures import open_picture

    first, second = open_picture(options.first), open_picture(options.second)
    real = _samples(options.real, options.num_images)
    pipeline = load_pipeline(options.model)
    _finish(interpolate(pipeline, first, second, options.steps, options.mode, real, options.seed), options.out)


def _compose(parser: ArgumentParser, args: list[str]) -> None:
    _add_model(parser)
    parser.add_argument("first", metavar="A", type=Path)
    parser.add_argument("second", metavar="B", type=Path)
    parser.add_argument(
        "--box",
        required=True,
        type=box,
        metavar="TOP,LEFT,HEIGHT,WIDTH",
        help="the region, in pixels that the model sees",
    )
    _add_drawing(parser)
    options = _parse(parser, args)
    from featinv_pl.explore.composition import compose
    from featinv_pl.pages.pictures import open_picture

    first, second = open_picture(options.first), open_picture(options.second)
    pipeline = load_pipeline(options.model)
    _finish(compose(pipeline, first, second, options.box, options.num_samples, options.seed), options.out)


def _compare(parser: ArgumentParser, args: list[str]) -> None:
    parser.add_argument("images", metavar="IMAGE", type=Path, nargs="+")
    parser.add_argument("--models", metavar="MODEL", required=True, nargs="+", help="folders of `export`, or hub names")
    parser.add_argument("--out", required=True, type=folder, help="the folder for page, picture and facts")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (%(default)s)")
    options = parser.parse_args(args)
    from featinv_pl.explore.comparison import compare
    from featinv_pl.pages.pictures import open_picture, unique_names

    pictures = [open_picture(path) for path in options.images]
    models = zip(unique_names([Path(model).name for model in options.models]), options.models, strict=True)
    names = unique_names([path.stem for path in options.images])
    _finish(
        compare(((name, load_pipeline(model)) for name, model in models), names, pictures, options.seed), options.out
    )


def _app(parser: ArgumentParser, args: list[str]) -> None:
    parser.add_argument("--model", required=True, help="a folder that `export` or `import` wrote, or its hub name")
    parser.add_argument("--concepts", type=Path, help="what `featinv-pl concepts` has written, to steer along")
    parser.add_argument(
        "--host", default="127.0.0.1", help="the address to listen at (%(default)s: this machine alone)"
    )
    parser.add_argument("--port", type=int, default=7860, help="(%(default)s)")
    options = parser.parse_args(args)
    from featinv_pl.explore.app import serve
    from featinv_pl.explore.concepts import Concepts

    concepts = Concepts.load(options.concepts) if options.concepts else None
    serve(load_pipeline(options.model), concepts, options.host, options.port)


class Command(NamedTuple):
    """One of our own commands."""

    run: Callable[[ArgumentParser, list[str]], None]
    """Adds its options to a parser, parses its line, and does the work."""
    does: str


COMMANDS = {
    "concepts": Command(_concepts, "find directions in feature space that mean something"),
    "steer": Command(_steer, "move a picture's feature map along a concept, and reconstruct it"),
    "interpolate": Command(_interpolate, "reconstruct what lies between two pictures' feature maps"),
    "compose": Command(_compose, "paste a region of one picture's feature map into another's, and reconstruct it"),
    "compare": Command(_compare, "pictures beside what several inverters reconstruct from them"),
    "app": Command(_app, "a page on this machine to reconstruct, steer and interpolate"),
}


# What they share


def _add_model(parser: ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="a folder that `export` or `import` wrote, or its hub name")
    parser.add_argument("--out", required=True, type=folder, help="the folder for page, picture and facts")


def _add_drawing(parser: ArgumentParser) -> None:
    parser.add_argument("--num_samples", type=positive, default=1, help="images of each map (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (%(default)s)")


def _parse(parser: ArgumentParser, args: list[str]) -> Namespace:
    """Parse values that begin with a minus, such as `--strengths -2:2:9`, which argparse takes for options."""
    joined = list(args)
    for name in SIGNED:
        if name in joined[:-1]:
            place = joined.index(name)
            joined[place : place + 2] = [f"{name}={joined[place + 1]}"]
    return parser.parse_args(joined)


def load_pipeline(model: str, precision: str = "32") -> "FeatInvPipeline":
    """An inverter on the GPU, if there is one, in `32` bits or `bf16`."""
    import torch

    from featinv_pl.inverter.pipeline import FeatInvPipeline

    dtype = torch.bfloat16 if precision == "bf16" else None
    return FeatInvPipeline.from_pretrained(model).to("cuda" if torch.cuda.is_available() else "cpu", dtype)


def _mask(options: Namespace, pipeline: "FeatInvPipeline") -> "Tensor | None":
    """Where to steer: (H, W) in [0, 1] of the size that the classifier sees, or None for everywhere."""
    from featinv_pl.explore.edits import box_mask
    from featinv_pl.pages.pictures import open_picture

    if options.box is not None:
        return box_mask(options.box, pipeline.inverter.classifier.input_size)
    if options.mask is None:
        return None
    picture, mask = open_picture(options.image), open_picture(options.mask, "`mask`")
    if mask.size != picture.size:
        raise UserError(
            f"`mask`: '{options.mask}' has {mask.width}x{mask.height} pixels, and '{options.image}' "
            f"{picture.width}x{picture.height}. Give a mask of the picture's size."
        )
    cropped = (pipeline.crop([mask])[0].mean(0) + 1) / 2
    if not cropped.any():
        raise UserError(
            f"`mask`: '{options.mask}' is black wherever the classifier looks, so nothing would change. "
            "Paint white what to change."
        )
    return cropped


def _samples(folder: Path | None, num_images: int) -> "Samples | None":
    from featinv_pl.explore.samples import read_samples

    return read_samples([folder], num_images, "`real`") if folder else None


def _finish(result: "Report", folder: Path) -> None:
    result.save(folder)
    print(f"{result.lead}\nOpen {folder / f'{result.name}.html'}.")


def positive(text: str) -> int:
    """A number of things, for argparse."""
    number = int(text)
    if number < 1:
        raise ArgumentTypeError(f"must be at least 1, and is {number}")
    return number


def folder(text: str) -> Path:
    """A folder to write to, for argparse."""
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise ArgumentTypeError(f"is a folder, and '{text}' is a file")
    return path


def strengths(text: str) -> list[float]:
    """`FROM:TO:COUNT`, evenly spaced, or values between commas."""
    try:
        if ":" not in text:
            return [float(value) for value in text.split(",")]
        start, end, count = text.split(":")
        steps = range(positive(count))
        return [float(start) + (float(end) - float(start)) * step / max(len(steps) - 1, 1) for step in steps]
    except ValueError as error:
        raise ArgumentTypeError(f"is FROM:TO:COUNT or values between commas, and is '{text}'") from error


def box(text: str) -> Sequence[int]:
    """`TOP,LEFT,HEIGHT,WIDTH`."""
    try:
        top, left, height, width = map(int, text.split(","))
    except ValueError as error:
        raise ArgumentTypeError(f"is TOP,LEFT,HEIGHT,WIDTH in pixels, and is '{text}'") from error
    return top, left, height, width
