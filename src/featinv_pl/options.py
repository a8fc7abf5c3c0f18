"""Options that our own commands share, and what parses them: a mistake is one sentence, not a page of usage."""

import re
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from shutil import get_terminal_size
from textwrap import fill
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from featinv_pl.bars import style, told
from featinv_pl.errors import UsageError, nearest, renamed

if TYPE_CHECKING:
    from featinv_pl.inverter.pipeline import FeatInvPipeline
    from featinv_pl.sampling.sampler import Sampler

MODEL = "a folder that `export` or `import` wrote, its hub name, or a run of `fit` or a checkpoint in it"
OUT = "the folder for what the command writes"


class Parser(ArgumentParser):
    """The parser of a command.

    Args:
        name: Of the command.
        does: What the command does, in a few words.
        example: A command line.
    """

    def __init__(self, name: str, does: str, example: str) -> None:
        super().__init__(
            f"featinv-pl {name}",
            description=f"{does[0].upper()}{does[1:]}.",
            epilog=f"example:\n  {example}",
            formatter_class=RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.example = example

    @property
    def options(self) -> list[str]:
        """The names of its options."""
        return [*re.findall(r"--[\w.]+", self.format_usage()), "--help"]

    def parse_args(self, args: Sequence[str], namespace: None = None) -> Namespace:  # type: ignore[override]
        """Parse, and refuse options that do not exist before those that are missing."""
        for name in (arg.partition("=")[0] for arg in args):
            if re.fullmatch(r"--\w[\w.-]*", name) and name not in self.options:
                self.error(f"there is no option {name}.{nearest(name, self.options)}")
        options = super().parse_args(args)
        told(self.prog, "loading")
        return options

    def error(self, message: str) -> NoReturn:
        """End with the reason, and an example where something is missing."""
        message = re.sub("^argument ", "", message).replace("the following arguments are required", "missing")
        example = f" Example: `{self.example}`" if message.startswith("missing") else ""
        raise UsageError(f"{message}{'' if message[-1] in '.?' else '.'}{example} (See `{self.prog} --help`.)")


def summed_up(text: str) -> None:
    """Print what a command has found; a terminal gets lines of its width."""
    width = get_terminal_size().columns if sys.stdout.isatty() else 0
    print("\n".join(fill(line, width) if width else line for line in text.splitlines()))


def ended(results: object, command: str) -> None:
    """Print where the results of a command are, and the command that follows."""
    print(f"Results: {results}\nNext: {command}")


def parse_pictures(
    parser: Parser, args: list[str], count: int | str, num_samples: int | None = None, model: bool = True
) -> Namespace:
    """Add the options of commands that reconstruct `count` pictures, and parse; `paths` are opened as `pictures`."""
    parser.add_argument("paths", metavar="IMAGE", type=Path, nargs=count, help="files of pictures, of any size")
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

    for path in options.paths:
        if path.is_dir():
            raise UsageError(f"IMAGE: '{path}' is a folder. Give its pictures, such as {path}/*.jpg.")
        if not path.exists():
            raise UsageError(f"IMAGE: there is no file '{path}'.")
    changed(Sampler(), options)  # a bad value is an error before anything is read
    options.pictures = [open_picture(path) for path in options.paths]
    return options


def add_over(parser: Parser, instead: str) -> None:
    """Options of commands that also work over a set of pictures."""
    parser.add_argument(
        "--over", type=Path, metavar="FOLDER", help=f"of pictures, or a shard set, in place of {instead}"
    )
    parser.add_argument("--label", metavar="CLASS", help="with --over: pictures of this label or class folder alone")
    parser.add_argument("--num_images", type=positive, default=64, help="with --over: at most (%(default)s)")


def parse_one_or_over(parser: Parser, args: list[str], count: int, num_samples: int | None = None) -> Namespace:
    """Parse the options of such a command, which else takes `count` pictures."""
    options = parse_pictures(parser, args, "*", num_samples)
    if len(options.paths) != (0 if options.over else count):
        besides = " besides --over" if options.over else ""
        parser.error(f"IMAGE: {len(options.paths)} given{besides}. Give {count}, or --over FOLDER")
    return options


def add_device(parser: Parser) -> None:
    """The option that names the device; see `device_of`."""
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (a GPU, if there is one)")


def device_of(options: Namespace) -> str:
    """The device that options name, else a GPU if there is one."""
    import torch

    return options.device or ("cuda" if torch.cuda.is_available() else "cpu")


def add_sampler(parser: Parser) -> None:
    """An option for each field of `Sampler`, for the device and for the precision."""
    from featinv_pl.sampling.sampler import Sampler

    add_device(parser)
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
    with renamed("source", "model"):
        pipeline = FeatInvPipeline.from_pretrained(
            model, torch_dtype=dtypes[options.precision], device=device_of(options)
        )
    pipeline.set_progress_bar_config(**style("sample", "step"), leave=False)
    pipeline.inverter.sampler = changed(pipeline.inverter.sampler, options)
    return pipeline


def made_from(options: Namespace, pipeline: "FeatInvPipeline | None") -> dict[str, str]:
    """What a page says of its origin: input, model, sampler and seed, and the command that made it, and when."""
    given, found = vars(options), dict[str, str]()
    inputs = dict.fromkeys(("paths", "over", "shards", "run"), "input")
    for key, name in {**inputs, "models": "models", "model": "model"}.items():
        if given.get(key):
            paths = given[key] if isinstance(given[key], list) else [given[key]]
            found[name] = ", ".join(f"`{path}`" for path in paths)
    if pipeline:
        inverter, sampler = pipeline.inverter, pipeline.inverter.sampler
        found["model"] += f", {inverter.conditioning} inverter of {inverter.classifier.title}"
        found["sampler"] = f"{sampler.scheduler}, {sampler.steps} steps, guidance {sampler.guidance_scale:g}"
    if "seed" in given:
        found["seed"] = str(options.seed)
    return found | {"made by": f"`{options.command}`", "made on": f"{date.today()}, version {version('featinv-pl')}"}


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
