"""Options that commands share, the sampler's among them, and what they amount to."""

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from featinv_pl.inverter.pipeline import FeatInvPipeline
    from featinv_pl.sampling.sampler import Sampler


def add_model(parser: ArgumentParser) -> None:
    """`--model`."""
    parser.add_argument("--model", required=True, help="a folder that `export` or `import` wrote, or its hub name")


def add_out(parser: ArgumentParser) -> None:
    """`--out`."""
    parser.add_argument("--out", required=True, type=folder, help="the folder for what the command writes")


def add_pictures(parser: ArgumentParser) -> None:
    """Two pictures, and what is common to the commands that take them."""
    parser.add_argument("first", metavar="A", type=Path)
    parser.add_argument("second", metavar="B", type=Path)
    add_model(parser)
    add_out(parser)


def add_sampling(parser: ArgumentParser, num_samples: int | None = None) -> None:
    """The options of commands that write reconstructions; `num_samples` is a default."""
    if num_samples is not None:
        parser.add_argument("--num_samples", type=positive, default=num_samples, help="of each map (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (%(default)s)")
    add_sampler(parser)


def add_sampler(parser: ArgumentParser) -> None:
    """An option for each field of `Sampler`, and for the precision."""
    from featinv_pl.sampling.sampler import Sampler

    parser.add_argument("--precision", choices=("32", "bf16"), default="32", help="bf16 is faster, and rounds")
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
    refine: dict[str, Any] = {name.removeprefix("refine."): given.pop(name) for name in nested}
    if refine:
        given["refine"] = replace(sampler.refine or Refinement(), **refine)
    return replace(sampler, **given)


def load_pipeline(model: str, options: Namespace) -> "FeatInvPipeline":
    """A model folder or hub name on the GPU, if there is one, with the sampler and precision that options give."""
    from featinv_pl.sampling.sampler import Sampler

    changed(Sampler(), options)  # a bad value is an error before anything is loaded
    import torch

    from featinv_pl.inverter.pipeline import FeatInvPipeline

    dtype = torch.bfloat16 if options.precision == "bf16" else None
    pipeline = FeatInvPipeline.from_pretrained(model).to("cuda" if torch.cuda.is_available() else "cpu", dtype)
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
        steps = range(positive(count))
        return [float(start) + (float(end) - float(start)) * step / max(len(steps) - 1, 1) for step in steps]
    except ValueError as error:
        raise ArgumentTypeError(f"must be FROM:TO:COUNT or values separated by commas, and is '{text}'") from error


def box(text: str) -> tuple[int, int, int, int]:
    """`TOP,LEFT,HEIGHT,WIDTH`."""
    try:
        top, left, height, width = map(int, text.split(","))
    except ValueError as error:
        raise ArgumentTypeError(f"must be TOP,LEFT,HEIGHT,WIDTH in pixels, and is '{text}'") from error
    return top, left, height, width
