"""The commands of `featinv-pl`, in one table; libraries are imported by the command that needs them."""

import re
import shlex
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from featinv_pl.bars import told
from featinv_pl.errors import UsageError, options_spelled, renamed
from featinv_pl.options import (
    MODEL,
    OUT,
    Parser,
    add_device,
    add_over,
    add_sampler,
    box,
    device_of,
    ended,
    folder,
    load_pipeline,
    made_from,
    parse_one_or_over,
    parse_pictures,
    positive,
    strengths,
    summed_up,
)

if TYPE_CHECKING:
    from featinv_pl.inverter.pipeline import FeatInvPipeline
    from featinv_pl.pages.page import Report

NUM_IMAGES = 2000
BOX = "TOP,LEFT,HEIGHT,WIDTH"
TRY = "featinv-pl reconstruct IMAGE --model {} --out DIR"
NEXT = {  # commands, by the page that was written
    "examples": "featinv-pl steer IMAGE --model MODEL --concepts {out} --out DIR",
    "steering": "featinv-pl steer --over FOLDER --model {model} --concepts {concepts} --concept {concept} --out DIR",
    "comparison": "featinv-pl app --model {models[0]}",
    "errors": "featinv-pl audit IMAGE --model {run} --out DIR",
    **dict.fromkeys(
        ("steered", "interpolation", "interpolated", "composition", "audit"), "featinv-pl app --model {model}"
    ),
}
CONCEPTS = "a folder that `featinv-pl concepts` wrote"


def _reconstruct(parser: Parser, args: list[str]) -> None:
    options = parse_pictures(parser, args, "+", num_samples=4)
    from featinv_pl.explore.reconstruct import reconstruct

    pipeline = load_pipeline(options.model, options)
    about = made_from(options, pipeline)
    pictures = pipeline, options.paths, options.pictures
    summed_up(reconstruct(*pictures, options.out, options.num_samples, options.seed, about))
    page = f"{options.out / 'reconstructions.html'} (open it in a browser)"
    ended(page, f"featinv-pl audit IMAGE --model {options.model} --out DIR")


def _concepts(parser: Parser, args: list[str]) -> None:
    parser.add_argument("shards", metavar="SHARDS", type=Path, nargs="+", help="shard sets of one backbone and layer")
    parser.add_argument("--method", choices=("nmf", "difference", "cav", "sae"), help="(nmf, or what directions are)")
    parser.add_argument("--out", required=True, type=folder, help=OUT)
    parser.add_argument("--num_concepts", type=positive, default=8, help="components of nmf (%(default)s)")
    parser.add_argument(
        "--between", metavar=("A", "B"), nargs=2, action="append", default=[],
        help="difference and cav: from class A to B, by label or folder; may be repeated. Without it, between two sets",
    )  # fmt: skip
    parser.add_argument("--pooled", action="store_true", help="difference and cav: the same direction at all locations")
    parser.add_argument(
        "--directions", type=Path, metavar="FILE",
        help="found elsewhere, .safetensors, .npz or .npy: measured on the shards, not found in them",
    )  # fmt: skip
    parser.add_argument("--key", help="of the array in that file, if it has several")
    parser.add_argument("--num_images", type=positive, default=NUM_IMAGES, help="at most, of each set (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of nmf (%(default)s)")
    options = parser.parse_args(args)
    if options.method == "sae" and not options.directions:
        parser.error("--method sae: a sparse autoencoder is trained elsewhere. Give its file as --directions")
    from featinv_pl.explore import concepts
    from featinv_pl.explore.exploration import read_samples
    from featinv_pl.explore.external import Directions
    from featinv_pl.explore.gallery import gallery

    with renamed("concepts", "directions"):
        given = options.directions and Directions.read(options.directions, options.key, options.method)
    samples = read_samples(options.shards, options.num_images, "SHARDS")
    if given:
        with renamed("concepts", "directions"):
            found = given.measured(samples)
    elif options.method in ("nmf", None):
        told(parser.prog, f"factorising {len(samples.keys)} maps")
        found = concepts.nmf_concepts(samples, options.num_concepts, options.seed)
    else:
        find = concepts.difference_concepts if options.method == "difference" else concepts.activation_vectors
        pairs = concepts.pairs_of_labels(samples, options.between) or concepts.pair_of_sets(samples)
        found = find(samples, pairs, options.pooled)
    found.save(options.out)
    _finish(gallery(found, samples), options)


def _steer(parser: Parser, args: list[str]) -> None:
    parser.add_argument(
        "--concepts", required=True, type=Path, metavar="CONCEPTS",
        help=f"{CONCEPTS}, or a .safetensors, .npz or .npy of directions",
    )  # fmt: skip
    parser.add_argument("--key", help="of the array in a file of directions, if it has several")
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
    parser.add_argument(
        "--class", dest="classes", type=int, action="append", default=[],
        help="that the edit asks for: plot its probability, and do not count it as another class; may be repeated",
    )  # fmt: skip
    add_over(parser, "IMAGE")
    options = parse_one_or_over(parser, args, 1, num_samples=1)
    if options.over and options.mask:
        parser.error("--mask is of the size of one picture. Give --box with --over")
    from featinv_pl.explore.concepts import TENSORS, Concepts
    from featinv_pl.explore.exploration import box_mask, origin_of, picture_mask
    from featinv_pl.explore.external import SUFFIXES, Directions
    from featinv_pl.explore.sets import find_pictures
    from featinv_pl.explore.steered import steer_over
    from featinv_pl.explore.steering import steer

    foreign = options.concepts.suffix in SUFFIXES and options.concepts.name != TENSORS
    given = Directions.read(options.concepts, options.key) if foreign else Concepts.load(options.concepts)
    number = given.number(options.concept) if isinstance(given, Concepts) else None
    found = find_pictures(options.over, options.num_images, options.label) if options.over else []
    pipeline = load_pipeline(options.model, options)
    concepts = given.concepts(origin_of(pipeline)) if isinstance(given, Directions) else given
    number = concepts.number(options.concept) if number is None else number
    mask = picture_mask(options.mask, options.paths[0], pipeline) if options.mask else None
    if options.box:
        mask = box_mask(options.box, pipeline.inverter.classifier.input_size)
    moved = concepts, number, options.strengths, options.edit, mask, options.classes, options.num_samples, options.seed
    if options.over:
        pipeline.set_progress_bar_config(disable=True)
    _finish(
        steer_over(pipeline, found, *moved) if options.over else steer(pipeline, options.pictures[0], *moved),
        options,
        pipeline,
    )


def _interpolate(parser: Parser, args: list[str]) -> None:
    parser.add_argument("--steps", type=positive, default=11, help="number of maps, ends included (%(default)s)")
    parser.add_argument("--mode", choices=("linear", "slerp"), default="linear", help="slerp keeps norms (%(default)s)")
    parser.add_argument("--real", type=Path, help="a shard set of real images; steps outside their range are flagged")
    parser.add_argument("--num_real", type=positive, default=NUM_IMAGES, help="at most, of --real (%(default)s)")
    parser.add_argument("--judge", metavar="BACKBONE", help="a held-out classifier that compares steps with --real")
    add_over(parser, "two IMAGE: pairs of its pictures")
    options = parse_one_or_over(parser, args, 2)
    from featinv_pl.explore.exploration import read_samples
    from featinv_pl.explore.interpolated import interpolate_over
    from featinv_pl.explore.pairs import interpolate
    from featinv_pl.explore.sets import find_pictures
    from featinv_pl.nets.backbone import Backbone

    if options.real is None and (options.judge or options.over):
        parser.error(f"--{'judge' if options.judge else 'over'} compares steps with real images. Give --real")
    real = read_samples([options.real], options.num_real, "`real`") if options.real else None
    with renamed("backbone", "judge"):
        judge = Backbone(options.judge).to(device_of(options)) if options.judge else None
    found = find_pictures(options.over, options.num_images, options.label) if options.over else []
    pipeline, paths = load_pipeline(options.model, options), (options.steps, options.mode)
    if options.over:
        assert real
        pipeline.set_progress_bar_config(disable=True)
        _finish(interpolate_over(pipeline, found, *paths, real, options.seed, judge), options, pipeline)
    else:
        first, second = options.pictures
        _finish(interpolate(pipeline, first, second, *paths, real, options.seed, judge), options, pipeline)


def _compose(parser: Parser, args: list[str]) -> None:
    parser.add_argument("--box", type=box, metavar=BOX, required=True, help="in pixels of the classifier's crop")
    options = parse_pictures(parser, args, 2, num_samples=1)
    from featinv_pl.explore.pairs import compose

    pipeline, (first, second) = load_pipeline(options.model, options), options.pictures
    _finish(compose(pipeline, first, second, options.box, options.num_samples, options.seed), options, pipeline)


def _compare(parser: Parser, args: list[str]) -> None:
    parser.add_argument("--models", metavar="MODEL", required=True, nargs="+", help="model folders, or hub names")
    options = parse_pictures(parser, args, "+", model=False)
    from featinv_pl.explore.reconstruct import compare
    from featinv_pl.pages.page import unique_names

    models = zip(unique_names([Path(model).name for model in options.models]), options.models, strict=True)
    pipelines = ((name, load_pipeline(model, options)) for name, model in models)
    with renamed("model", "models"):
        found = compare(pipelines, unique_names([path.stem for path in options.paths]), options.pictures, options.seed)
    _finish(found, options)


def _audit(parser: Parser, args: list[str]) -> None:
    parser.add_argument(
        "--methods", nargs="+", choices=("inverter", "refined", "training-free"), default=["inverter"],
        help="each makes num_samples: the inverter as it is, with gradient steps, or these without control (inverter)",
    )  # fmt: skip
    parser.add_argument(
        "--fidelity", type=float, metavar="COSINE",
        help="of an accepted sample's map with the picture's, at least (that of the autoencoder's reconstruction)",
    )  # fmt: skip
    parser.add_argument("--others", metavar="BACKBONE", nargs="+", default=[], help="classifiers to ask besides")
    options = parse_pictures(parser, args, "+", num_samples=64)
    from featinv_pl.explore.audit import audit
    from featinv_pl.nets.backbone import Backbone
    from featinv_pl.pages.page import unique_names

    pipeline = load_pipeline(options.model, options)
    with renamed("backbone", "others"):
        others = {name: Backbone(name).to(pipeline.device) for name in options.others}
    names = unique_names([path.stem for path in options.paths])
    sampled = options.num_samples, options.methods, options.fidelity
    _finish(audit(pipeline, names, options.pictures, *sampled, others, options.seed), options, pipeline)


def _app(parser: Parser, args: list[str]) -> None:
    parser.add_argument("--model", required=True, help=MODEL)
    parser.add_argument("--concepts", type=Path, help=f"{CONCEPTS}, to steer along")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at (%(default)s: this machine only)")
    parser.add_argument("--port", type=int, default=7860, help="(%(default)s)")
    add_sampler(parser)
    options = parser.parse_args(args)
    print(f"Loading {options.model}, then serving it at http://{options.host}:{options.port} ...", flush=True)
    from featinv_pl.explore.app import serve
    from featinv_pl.explore.concepts import Concepts

    concepts = Concepts.load(options.concepts) if options.concepts else None
    serve(load_pipeline(options.model, options), options.model, concepts, options.host, options.port)


def _export(parser: Parser, args: list[str]) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="the folder of a run of `fit`, or a checkpoint in it")
    parser.add_argument("out", metavar="OUT", type=Path, help="a new folder")
    parser.add_argument("--license", metavar="ID", help="of the weights, as the hub calls it (that of a known prior)")
    options = parser.parse_args(args)
    if not options.run.exists():
        raise UsageError(f"RUN: there is no '{options.run}'. Give the folder of a run of `featinv-pl fit`.")
    from featinv_pl.publishing import export

    ended(export(options.run, options.out, options.license), TRY.format(options.out))


def _import(parser: Parser, args: list[str]) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="their ControlLDM, .ckpt or .safetensors")
    parser.add_argument("out", metavar="OUT", type=Path, help="a new folder")
    parser.add_argument(
        "--model.backbone",
        dest="backbone",
        help="their classifier (%(default)s)",
        default="convnext_base.fb_in22k_ft_in1k",
    )
    parser.add_argument(
        "--model.weights", dest="weights", default="pretrained", help="of the backbone: `%(default)s`, or a file"
    )
    parser.add_argument("--model.input_size", dest="input_size", type=int, help="of the backbone, in pixels (288)")
    parser.add_argument("--model.prior", dest="prior", help="(%(default)s)", default="lambdalabs/miniSD-diffusers")
    parser.add_argument("--model.image_size", dest="image_size", type=int, default=256, help="in pixels (%(default)s)")
    options = parser.parse_args(args)
    size = options.input_size
    if options.backbone == parser.get_default("backbone") and size is None:
        size = 288
    from featinv_pl.publishing import import_official

    theirs = options.backbone, options.prior, options.weights, size, options.image_size
    ended(import_official(options.checkpoint, options.out, *theirs), TRY.format(options.out))


def _verify(parser: Parser, args: list[str]) -> None:
    parser.add_argument("folder", metavar="FOLDER", type=Path, nargs="+", help="a shard set, or a folder of some")
    options = parser.parse_args(args)
    for one in options.folder:
        if not one.is_dir():
            raise UsageError(f"FOLDER: there is no folder '{one}'. Give one that `featinv-pl predict` wrote.")
        if not any(path.suffix == ".tar" or path.name == "manifest.json" for path in one.rglob("*")):
            raise UsageError(f"FOLDER: '{one}' holds no feature shards. Give a folder that `featinv-pl predict` wrote.")
    from featinv_pl.data.shards.reader import verify

    results = [verify(one) for one in options.folder]
    if not all(results):
        sys.exit(1)
    sets = " ".join(map(str, options.folder))
    ended(f"nothing is damaged in {sets}", "featinv-pl fit --config FILE --data.train=SET --data.val=SET")


def _report(parser: Parser, args: list[str]) -> None:
    parser.add_argument(
        "folder", metavar="FOLDER", type=Path, help="holds one folder per inverter, as `test` has left it"
    )
    options = parser.parse_args(args)
    from featinv_pl.evaluation.report import report

    best = report(options.folder)
    ended(f"{options.folder / 'report.html'} (open it in a browser)", f"featinv-pl export {best} OUT")


def _errors(parser: Parser, args: list[str]) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="the folder of a run, as `test` has left it")
    parser.add_argument("--out", required=True, type=folder, help=OUT)
    parser.add_argument("--num_images", type=positive, default=8, help="shown of each kind of error (%(default)s)")
    add_device(parser)
    options = parser.parse_args(args)
    from featinv_pl.evaluation.failures import find_errors

    _finish(find_errors(options.run, options.num_images, device_of(options)), options)


class Command(NamedTuple):
    """A command: its line in `--help` and docs/commands.md, what parses options and does the work, an example."""

    does: str
    run: Callable[[Parser, list[str]], None] | None  # None of the commands of Lightning
    example: str


COMMANDS = {
    "fit": Command(
        "train a Classifier, Autoencoder, NoisePredictor or FeatureInversion", None,
        "featinv-pl fit --config experiments/digits/classifier.yaml --trainer.max_steps=100",
    ),
    "predict": Command(
        "extract features of images into shards", None,
        "featinv-pl predict --config experiments/digits/extract.yaml",
    ),
    "validate": Command(
        "score a FeatureInversion on its validation shards", None,
        "featinv-pl validate --config runs/demo/spatial/fit.yaml --ckpt_path=last",
    ),
    "test": Command(
        "score a FeatureInversion on test sets", None,
        "featinv-pl test --config runs/demo/spatial/fit.yaml --ckpt_path=last",
    ),
    "reconstruct": Command(
        "reconstruct pictures from their feature maps", _reconstruct,
        "featinv-pl reconstruct cat.jpg dog.jpg --model runs/inverter --out runs/reconstructed",
    ),
    "concepts": Command(
        "find meaningful directions in feature space", _concepts,
        "featinv-pl concepts runs/demo/shards/train --num_concepts 16 --out runs/concepts",
    ),
    "steer": Command(
        "move a picture's feature map along a concept", _steer,
        "featinv-pl steer cat.jpg --model runs/inverter --concepts runs/concepts --out runs/steered",
    ),
    "interpolate": Command(
        "reconstruct the path between two feature maps", _interpolate,
        "featinv-pl interpolate cat.jpg dog.jpg --model runs/inverter --out runs/between",
    ),
    "compose": Command(
        "paste a region of one feature map into another", _compose,
        "featinv-pl compose cat.jpg dog.jpg --box 0,0,112,112 --model runs/inverter --out runs/composed",
    ),
    "compare": Command(
        "show pictures beside several inverters' reconstructions", _compare,
        "featinv-pl compare cat.jpg dog.jpg --models runs/one runs/other --out runs/compared",
    ),
    "audit": Command(
        "find what a classifier ignores: what varies at fixed features", _audit,
        "featinv-pl audit cat.jpg dog.jpg --model runs/inverter --out runs/audited",
    ),
    "app": Command(
        "serve a page to reconstruct, steer, compose and audit", _app,
        "featinv-pl app --model runs/inverter --port 8000",
    ),
    "export": Command(
        "write a trained inverter as a model folder to publish", _export,
        "featinv-pl export runs/demo/spatial runs/inverter",
    ),
    "import": Command(
        "write the authors' checkpoint as a model folder", _import,
        "featinv-pl import featinv.ckpt runs/authors --model.prior miniSD.ckpt",
    ),
    "verify": Command(
        "check feature shards against their manifest", _verify,
        "featinv-pl verify runs/demo/shards",
    ),
    "report": Command(
        "write a page of scored inverters: pictures, tables, curves", _report,
        "featinv-pl report runs/demo",
    ),
    "errors": Command(
        "show why a classifier errs, from the maps of its errors", _errors,
        "featinv-pl errors runs/demo/spatial --out runs/errors",
    ),
}  # fmt: skip


def run_command(name: str, args: list[str]) -> None:
    """Run one of our own commands; the messages of its errors name its options."""
    does, run, example = COMMANDS[name]
    assert run
    parser = Parser(name, does, example)
    parser.set_defaults(command=shlex.join(["featinv-pl", name, *args]))
    # `--strengths -2:2:9` and `--box -1,...`: argparse takes a value that begins with a minus for an option.
    args = [re.sub(r"^(?=-[\d.]+[:,])", " ", arg) for arg in args]
    with options_spelled(lambda: parser.options):
        run(parser, args)


def _finish(result: "Report", options: Namespace, pipeline: "FeatInvPipeline | None" = None) -> None:
    folder = options.out
    result.save(folder, made_from(options, pipeline))
    summed_up(result.lead)
    page = folder / f"{result.name}.html"
    ended(f"{page} (open it in a browser; .png and .json beside it)", NEXT[result.name].format(**vars(options)))
