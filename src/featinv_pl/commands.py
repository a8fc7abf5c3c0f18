"""The commands of `featinv-pl`, in one table; libraries are imported by the command that needs them."""

import re
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from featinv_pl.errors import options_spelled, renamed
from featinv_pl.options import (
    add_model,
    add_out,
    add_pictures,
    add_sampler,
    add_sampling,
    box,
    load_pipeline,
    positive,
    strengths,
)  # fmt: skip

if TYPE_CHECKING:
    from featinv_pl.pages.page import Report

NUM_IMAGES = 2000
BOX = "TOP,LEFT,HEIGHT,WIDTH"


def _reconstruct(parser: ArgumentParser, args: list[str]) -> None:
    parser.add_argument("images", metavar="IMAGE", type=Path, nargs="+")
    add_model(parser)
    add_out(parser)
    add_sampling(parser, num_samples=4)
    options = parser.parse_args(args)
    from featinv_pl.explore.reconstruct import reconstruct

    pipeline = load_pipeline(options.model, options)
    print(reconstruct(pipeline, options.images, options.out, options.num_samples, options.seed))


def _concepts(parser: ArgumentParser, args: list[str]) -> None:
    parser.add_argument("shards", metavar="SHARDS", type=Path, nargs="+", help="shard sets of one backbone and layer")
    parser.add_argument("--method", choices=("nmf", "difference", "cav"), default="nmf", help="(%(default)s)")
    add_out(parser)
    parser.add_argument("--num_concepts", type=positive, default=8, help="components of nmf (%(default)s)")
    parser.add_argument(
        "--between", metavar=("A", "B"), nargs=2, action="append", default=[],
        help="difference and cav: from class A to B, by label or folder; may be repeated. Without it, between two sets",
    )  # fmt: skip
    parser.add_argument("--pooled", action="store_true", help="difference and cav: the same direction at all locations")
    parser.add_argument("--num_images", type=positive, default=NUM_IMAGES, help="at most, of each set (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of nmf (%(default)s)")
    options = parser.parse_args(args)
    from featinv_pl.explore import concepts
    from featinv_pl.explore.gallery import gallery
    from featinv_pl.explore.samples import read_samples

    samples = read_samples(options.shards, options.num_images, "SHARDS")
    if options.method == "nmf":
        found = concepts.nmf_concepts(samples, options.num_concepts, options.seed)
    else:
        find = concepts.difference_concepts if options.method == "difference" else concepts.activation_vectors
        pairs = concepts.pairs_of_labels(samples, options.between) or concepts.pair_of_sets(samples)
        found = find(samples, pairs, options.pooled)
    found.save(options.out)
    _finish(gallery(found, samples), options.out)


def _steer(parser: ArgumentParser, args: list[str]) -> None:
    parser.add_argument("image", metavar="IMAGE", type=Path)
    add_model(parser)
    add_out(parser)
    parser.add_argument("--concepts", required=True, type=Path, help="a folder that `featinv-pl concepts` wrote")
    parser.add_argument("--concept", default="0", help="by number or name (%(default)s)")
    parser.add_argument("--edit", choices=("add", "scale", "remove"), default="add", help="(%(default)s)")
    parser.add_argument(
        "--strengths", type=strengths, default=strengths("-2:2:9"), metavar="FROM:TO:COUNT",
        help="or values separated by commas. add: multiples of the direction; scale: factors of an NMF component's "
        "contribution; remove: fractions of it (-2:2:9)",
    )  # fmt: skip
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--box", type=box, metavar=BOX, help="the region to edit, in pixels of the classifier's crop")
    where.add_argument("--mask", type=Path, help="the region to edit: a picture of the size of IMAGE, white inside")
    parser.add_argument("--class", dest="classes", type=int, action="append", default=[], help="plot its probability")
    add_sampling(parser, num_samples=1)
    options = parser.parse_args(args)
    from featinv_pl.explore.concepts import Concepts
    from featinv_pl.explore.edits import box_mask, picture_mask
    from featinv_pl.explore.steering import steer
    from featinv_pl.pages.pictures import open_picture

    picture, concepts = open_picture(options.image), Concepts.load(options.concepts)
    concept = concepts.number(options.concept)
    pipeline = load_pipeline(options.model, options)
    mask = picture_mask(options.mask, options.image, pipeline) if options.mask else None
    if options.box:
        mask = box_mask(options.box, pipeline.inverter.classifier.input_size)
    edit = options.strengths, options.edit, mask
    found = steer(pipeline, picture, concepts, concept, *edit, options.classes, options.num_samples, options.seed)
    _finish(found, options.out)


def _interpolate(parser: ArgumentParser, args: list[str]) -> None:
    add_pictures(parser)
    parser.add_argument("--steps", type=positive, default=11, help="number of maps, ends included (%(default)s)")
    parser.add_argument("--mode", choices=("linear", "slerp"), default="linear", help="slerp keeps norms (%(default)s)")
    parser.add_argument("--real", type=Path, help="a shard set of real images; steps outside their range are flagged")
    parser.add_argument("--num_images", type=positive, default=NUM_IMAGES, help="at most, of --real (%(default)s)")
    add_sampling(parser)
    options = parser.parse_args(args)
    from featinv_pl.explore.interpolation import interpolate
    from featinv_pl.explore.samples import read_samples
    from featinv_pl.pages.pictures import open_picture

    first, second = open_picture(options.first), open_picture(options.second)
    real = read_samples([options.real], options.num_images, "`real`") if options.real else None
    pipeline = load_pipeline(options.model, options)
    _finish(interpolate(pipeline, first, second, options.steps, options.mode, real, options.seed), options.out)


def _compose(parser: ArgumentParser, args: list[str]) -> None:
    add_pictures(parser)
    parser.add_argument("--box", type=box, metavar=BOX, required=True, help="in pixels of the classifier's crop")
    add_sampling(parser, num_samples=1)
    options = parser.parse_args(args)
    from featinv_pl.explore.composition import compose
    from featinv_pl.pages.pictures import open_picture

    first, second = open_picture(options.first), open_picture(options.second)
    pipeline = load_pipeline(options.model, options)
    _finish(compose(pipeline, first, second, options.box, options.num_samples, options.seed), options.out)


def _compare(parser: ArgumentParser, args: list[str]) -> None:
    parser.add_argument("images", metavar="IMAGE", type=Path, nargs="+")
    parser.add_argument("--models", metavar="MODEL", required=True, nargs="+", help="model folders, or hub names")
    add_out(parser)
    add_sampling(parser)
    options = parser.parse_args(args)
    from featinv_pl.explore.comparison import compare
    from featinv_pl.pages.pictures import open_picture, unique_names

    pictures = [open_picture(path) for path in options.images]
    models = zip(unique_names([Path(model).name for model in options.models]), options.models, strict=True)
    pipelines = ((name, load_pipeline(model, options)) for name, model in models)
    names = unique_names([path.stem for path in options.images])
    with renamed("model", "models"):
        found = compare(pipelines, names, pictures, options.seed)
    _finish(found, options.out)


def _app(parser: ArgumentParser, args: list[str]) -> None:
    add_model(parser)
    parser.add_argument("--concepts", type=Path, help="a folder that `featinv-pl concepts` wrote, to steer along")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at (%(default)s: this machine only)")
    parser.add_argument("--port", type=int, default=7860, help="(%(default)s)")
    add_sampler(parser)
    options = parser.parse_args(args)
    from featinv_pl.explore.app import serve
    from featinv_pl.explore.concepts import Concepts

    concepts = Concepts.load(options.concepts) if options.concepts else None
    serve(load_pipeline(options.model, options), concepts, options.host, options.port)


def _export(parser: ArgumentParser, args: list[str]) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="the folder of a run of `fit`, or a checkpoint in it")
    parser.add_argument("out", metavar="OUT", type=Path, help="a new folder")
    options = parser.parse_args(args)
    from featinv_pl.publishing import export

    print(export(options.run, options.out))


def _import(parser: ArgumentParser, args: list[str]) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="their ControlLDM, .ckpt or .safetensors")
    parser.add_argument("out", metavar="OUT", type=Path, help="a new folder")
    parser.add_argument("--model.backbone", dest="backbone", default="convnext_base.fb_in22k_ft_in1k")
    parser.add_argument("--model.weights", dest="weights", default="pretrained", help="of the backbone; or a file")
    parser.add_argument("--model.input_size", dest="input_size", type=int, help="of the backbone (their ConvNeXt: 288)")
    parser.add_argument("--model.prior", dest="prior", default="lambdalabs/miniSD-diffusers")
    parser.add_argument("--model.image_size", dest="image_size", type=int, default=256)
    options = vars(parser.parse_args(args))
    if options["backbone"] == parser.get_default("backbone") and options["input_size"] is None:
        options["input_size"] = 288
    from featinv_pl.publishing import import_official

    print(import_official(options.pop("checkpoint"), options.pop("out"), **options))


def _verify(parser: ArgumentParser, args: list[str]) -> None:
    parser.add_argument("folder", type=Path, nargs="+", help="a shard set, or a folder of some")
    options = parser.parse_args(args)
    from featinv_pl.data.shards.reader import verify

    results = [verify(folder) for folder in options.folder]
    if not all(results):
        sys.exit(1)


def _report(parser: ArgumentParser, args: list[str]) -> None:
    parser.add_argument("folder", type=Path, help="holds one folder per inverter, as `test` has left it")
    options = parser.parse_args(args)
    from featinv_pl.evaluation.report import report

    report(options.folder)
    print(f"Open {options.folder / 'report.html'}.")


class Command(NamedTuple):
    """A command: its line in `--help` and in the README, and what runs it."""

    does: str
    run: Callable[[ArgumentParser, list[str]], None] | None
    """Adds its options to a parser, parses its line and does the work; None of the commands of Lightning."""


COMMANDS = {
    "fit": Command("train a Classifier, Autoencoder, NoisePredictor or FeatureInversion", None),
    "predict": Command("extract features of images into shards", None),
    "validate": Command("score a FeatureInversion on its validation shards", None),
    "test": Command("score a FeatureInversion on test sets", None),
    "reconstruct": Command("reconstruct pictures from their feature maps", _reconstruct),
    "concepts": Command("find meaningful directions in feature space", _concepts),
    "steer": Command("move a picture's feature map along a concept", _steer),
    "interpolate": Command("reconstruct the path between two feature maps", _interpolate),
    "compose": Command("paste a region of one feature map into another", _compose),
    "compare": Command("show pictures beside several inverters' reconstructions", _compare),
    "app": Command("serve a page to reconstruct, steer and interpolate", _app),
    "export": Command("write a trained inverter as a model folder to publish", _export),
    "import": Command("write the authors' checkpoint as a model folder", _import),
    "verify": Command("check feature shards against their manifest", _verify),
    "report": Command("write a page of scored inverters: pictures, tables, curves", _report),
}


def run_command(name: str, args: list[str]) -> None:
    """Run one of our own commands; the messages of its errors name its options."""
    does, run = COMMANDS[name]
    assert run
    parser = ArgumentParser(f"featinv-pl {name}", description=f"{does[0].upper()}{does[1:]}.")
    with options_spelled(lambda: re.findall(r"--[\w.]+", parser.format_usage())):
        run(parser, _joined(args))


def _joined(args: list[str]) -> list[str]:
    """Join `--strengths -2:2:9` by `=`: argparse takes a value that begins with a minus for an option."""
    joined: list[str] = []
    for arg in args:
        if joined and re.match(r"-[\d.]+[:,]", arg):
            joined[-1] += f"={arg}"
        else:
            joined.append(arg)
    return joined


def _finish(result: "Report", folder: Path) -> None:
    result.save(folder)
    print(f"{result.lead}\nOpen {folder / f'{result.name}.html'}.")
