"""The commands of `featinv-pl`, in one table; libraries are imported by the command that needs them."""

import re
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from featinv_pl.errors import options_spelled, renamed

if TYPE_CHECKING:
    from featinv_pl.inverter.pipeline import FeatInvPipeline
    from featinv_pl.pages.page import Report
    from featinv_pl.sampling.sampler import Sampler

NUM_IMAGES = 2000
BOX = "TOP,LEFT,HEIGHT,WIDTH"
MODEL = "a folder that `export` or `import` wrote, its hub name, or a run of `fit` or a checkpoint in it"
OUT = "the folder for what the command writes"
CONCEPTS = "a folder that `featinv-pl concepts` wrote"


def _reconstruct(parser: ArgumentParser, args: list[str]) -> None:
    options = parse_pictures(parser, args, "+", num_samples=4)
    from featinv_pl.explore.reconstruct import reconstruct

    pictures = load_pipeline(options.model, options), options.paths, options.pictures
    print(reconstruct(*pictures, options.out, options.num_samples, options.seed))


def _concepts(parser: ArgumentParser, args: list[str]) -> None:
    parser.add_argument("shards", metavar="SHARDS", type=Path, nargs="+", help="shard sets of one backbone and layer")
    parser.add_argument("--method", choices=("nmf", "difference", "cav"), default="nmf", help="(%(default)s)")
    parser.add_argument("--out", required=True, type=folder, help=OUT)
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
    from featinv_pl.explore.exploration import read_samples

    samples = read_samples(options.shards, options.num_images, "SHARDS")
    if options.method == "nmf":
        found = concepts.nmf_concepts(samples, options.num_concepts, options.seed)
    else:
        find = concepts.difference_concepts if options.method == "difference" else concepts.activation_vectors
        pairs = concepts.pairs_of_labels(samples, options.between) or concepts.pair_of_sets(samples)
        found = find(samples, pairs, options.pooled)
    found.save(options.out)
    _finish(concepts.gallery(found, samples), options.out)


def _steer(parser: ArgumentParser, args: list[str]) -> None:
    parser.add_argument("--concepts", required=True, type=Path, help=CONCEPTS)
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
    options = parse_pictures(parser, args, 1, num_samples=1)
    from featinv_pl.explore.concepts import Concepts
    from featinv_pl.explore.exploration import box_mask, picture_mask
    from featinv_pl.explore.steering import steer

    concepts = Concepts.load(options.concepts)
    concept = concepts.number(options.concept)
    pipeline = load_pipeline(options.model, options)
    mask = picture_mask(options.mask, options.paths[0], pipeline) if options.mask else None
    if options.box:
        mask = box_mask(options.box, pipeline.inverter.classifier.input_size)
    moved = options.pictures[0], concepts, concept, options.strengths, options.edit, mask, options.classes
    _finish(steer(pipeline, *moved, options.num_samples, options.seed), options.out)


def _interpolate(parser: ArgumentParser, args: list[str]) -> None:
    parser.add_argument("--steps", type=positive, default=11, help="number of maps, ends included (%(default)s)")
    parser.add_argument("--mode", choices=("linear", "slerp"), default="linear", help="slerp keeps norms (%(default)s)")
    parser.add_argument("--real", type=Path, help="a shard set of real images; steps outside their range are flagged")
    parser.add_argument("--num_images", type=positive, default=NUM_IMAGES, help="at most, of --real (%(default)s)")
    options = parse_pictures(parser, args, 2)
    from featinv_pl.explore.exploration import read_samples
    from featinv_pl.explore.pairs import interpolate

    real = read_samples([options.real], options.num_images, "`real`") if options.real else None
    pipeline, (first, second) = load_pipeline(options.model, options), options.pictures
    _finish(interpolate(pipeline, first, second, options.steps, options.mode, real, options.seed), options.out)


def _compose(parser: ArgumentParser, args: list[str]) -> None:
    parser.add_argument("--box", type=box, metavar=BOX, required=True, help="in pixels of the classifier's crop")
    options = parse_pictures(parser, args, 2, num_samples=1)
    from featinv_pl.explore.pairs import compose

    pipeline, (first, second) = load_pipeline(options.model, options), options.pictures
    _finish(compose(pipeline, first, second, options.box, options.num_samples, options.seed), options.out)


def _compare(parser: ArgumentParser, args: list[str]) -> None:
    parser.add_argument("--models", metavar="MODEL", required=True, nargs="+", help="model folders, or hub names")
    options = parse_pictures(parser, args, "+", model=False)
    from featinv_pl.explore.reconstruct import compare
    from featinv_pl.pages.page import unique_names

    models = zip(unique_names([Path(model).name for model in options.models]), options.models, strict=True)
    pipelines = ((name, load_pipeline(model, options)) for name, model in models)
    with renamed("model", "models"):
        found = compare(pipelines, unique_names([path.stem for path in options.paths]), options.pictures, options.seed)
    _finish(found, options.out)


def _app(parser: ArgumentParser, args: list[str]) -> None:
    parser.add_argument("--model", required=True, help=MODEL)
    parser.add_argument("--concepts", type=Path, help=f"{CONCEPTS}, to steer along")
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
    parser.add_argument("--license", metavar="ID", help="of the weights, as the hub calls it (that of a known prior)")
    options = parser.parse_args(args)
    from featinv_pl.publishing import export

    print(export(options.run, options.out, options.license))


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
    """A command: its line in `--help` and in the README, and what parses its options and does the work."""

    does: str
    run: Callable[[ArgumentParser, list[str]], None] | None  # None of the commands of Lightning


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
    # `--strengths -2:2:9` and `--box -1,...`: argparse takes a value that begins with a minus for an option.
    args = [re.sub(r"^(?=-[\d.]+[:,])", " ", arg) for arg in args]
    with options_spelled(lambda: re.findall(r"--[\w.]+", parser.format_usage())):
        run(parser, args)


def _finish(result: "Report", folder: Path) -> None:
    result.save(folder)
    print(f"{result.lead}\nOpen {folder / f'{result.name}.html'}.")


# Options that commands share


def parse_pictures(
    parser: ArgumentParser, args: list[str], count: int | str, num_samples: int | None = None, model: bool = True
) -> Namespace:
    """Add the options of commands that reconstruct `count` pictures, and parse; `paths` are opened as `pictures`."""
    parser.add_argument("paths", metavar="IMAGE", type=Path, nargs=count)
    if model:
        parser.add_argument("--model", required=True, help=MODEL)
    parser.add_argument("--out", required=True, type=folder, help=OUT)
    if num_samples is not None:
        parser.add_argument("--num_samples", type=positive, default=num_samples, help="of each map (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (%(default)s)")
    add_sampler(parser)
    options = parser.parse_args(args)
    from featinv_pl.pages.page import open_picture
    from featinv_pl.sampling.sampler import Sampler

    changed(Sampler(), options)  # a bad value is an error before anything is read
    options.pictures = [open_picture(path) for path in options.paths]
    return options


def add_sampler(parser: ArgumentParser) -> None:
    """An option for each field of `Sampler`, for the device and for the precision."""
    from featinv_pl.sampling.sampler import Sampler

    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (a GPU, if there is one)")
    parser.add_argument(
        "--precision",
        choices=("32", "bf16", "16"),
        help="of sampling; 16 bits are faster, and round (bf16 on CUDA, 32 elsewhere)",
    )
    group = parser.add_argument_group("sampler", "How images are sampled; what is not given is as in the model folder.")
    _add_fields(group, Sampler, "--sampler")


def _add_fields(group: Any, settings: Any, prefix: str) -> None:
    """An option for each field of a dataclass, with the help of its docstring; fields of fields have longer names."""
    import docstring_parser

    helps = {one.arg_name: one.description for one in docstring_parser.parse(settings.__doc__ or "").params}
    hints = get_type_hints(settings)
    for field in fields(settings):
        name, hint = f"{prefix}.{field.name}", hints[field.name]
        if NoneType in get_args(hint):
            hint = next(one for one in get_args(hint) if one is not NoneType)
        if is_dataclass(hint):
            _add_fields(group, hint, name)
            continue
        kind: dict[str, Any] = {"type": hint, "metavar": "N" if hint is int else "X"}
        if get_origin(hint) is Literal:
            kind = {"choices": get_args(hint)}
        elif get_origin(hint) is tuple:
            kind = {"nargs": len(get_args(hint)), "type": get_args(hint)[0], "metavar": ("LOW", "HIGH")}
        group.add_argument(name, help=(helps[field.name] or "").replace("%", "%%"), **kind)


def changed(sampler: "Sampler", options: Namespace) -> "Sampler":
    """A sampler with the fields that options give in place of its own."""
    from featinv_pl.sampling.sampler import Refinement

    given: dict[str, Any] = {
        name.removeprefix("sampler."): tuple(value) if isinstance(value, list) else value
        for name, value in vars(options).items()
        if name.startswith("sampler.") and value is not None
    }
    nested = [name for name in given if name.startswith("refine.")]
    if refine := {name.removeprefix("refine."): given.pop(name) for name in nested}:
        given["refine"] = replace(sampler.refine or Refinement(), **refine)
    return replace(sampler, **given)


def load_pipeline(model: str, options: Namespace) -> "FeatInvPipeline":
    """An inverter on the GPU, if there is one, with the sampler, device and precision that options give."""
    import torch

    from featinv_pl.inverter.pipeline import FeatInvPipeline

    dtypes = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16, None: None}
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with renamed("source", "model"):
        pipeline = FeatInvPipeline.from_pretrained(model, torch_dtype=dtypes[options.precision], device=device)
    pipeline.inverter.sampler = changed(pipeline.inverter.sampler, options)
    return pipeline


def positive(text: str) -> int:
    """An integer of at least 1."""
    number = int(text)
    if number < 1:
        raise ArgumentTypeError(f"must be at least 1, and is {number}")
    return number


def folder(text: str) -> Path:
    """A folder to write to."""
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise ArgumentTypeError(f"must be a folder, and '{text}' is a file")
    return path


def strengths(text: str) -> list[float]:
    """`FROM:TO:COUNT`, evenly spaced, or values separated by commas."""
    try:
        if ":" not in text:
            return [float(value) for value in text.split(",")]
        start, end, count = text.split(":")
        steps = positive(count)
        return [float(start) + (float(end) - float(start)) * step / max(steps - 1, 1) for step in range(steps)]
    except ValueError as error:
        raise ArgumentTypeError(
            f"must be FROM:TO:COUNT or values separated by commas, and is '{text.strip()}'"
        ) from error


def box(text: str) -> tuple[int, int, int, int]:
    """`TOP,LEFT,HEIGHT,WIDTH`."""
    try:
        top, left, height, width = map(int, text.split(","))
    except ValueError as error:
        raise ArgumentTypeError(f"must be TOP,LEFT,HEIGHT,WIDTH in pixels, and is '{text.strip()}'") from error
    return top, left, height, width
