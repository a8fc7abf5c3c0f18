"""The command: Lightning's fit, validate, test and predict, and a few of our own."""

import errno
import logging
import os
import re
import select
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from signal import SIGPIPE
from typing import Any

from featinv_pl.commands import COMMANDS, Command, folder, load_pipeline, positive
from featinv_pl.errors import UserError, options_spelled, user_error
from featinv_pl.masking import masked

OVERLAY = "FEATINV_CONFIG"
REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
TRAINER_COMMANDS = {
    "fit": "train a Classifier, Autoencoder, NoisePredictor or FeatureInversion",
    "validate": "score a FeatureInversion on its validation shards",
    "test": "score a FeatureInversion on any number of test sets",
    "predict": "extract features of images into shards",
}


def main(args: list[str] | None = None) -> None:
    """Run one command; what users can put right ends as one line on stderr and exit status 1."""
    arguments = sys.argv[1:] if args is None else args
    try:
        _check_home()
        with _log_shown():
            run(arguments)
        sys.stdout.flush()  # here, where a reader that has gone is no error
    except ValueError as error:
        # Out of a data loader's worker, torch returns the message with the worker's traceback before it.
        message = str(user_error(error)).rpartition(f"{UserError.__name__}: ")[2].strip()
        line = "\\n".join(masked(message).splitlines())  # which a path may contain
        print(f"featinv-pl: error: {line}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python would complain at its end
            sys.exit(128 + SIGPIPE)
        if error.errno not in REFUSALS:
            raise
        where = f" '{error.filename}'" if error.filename else ""
        print(
            f"featinv-pl: error: the file system refuses{where}: {error.strerror}. Complete files are intact. "
            "Free space or fix permissions, then rerun the same command.",
            file=sys.stderr,
        )
        sys.exit(1)
    except KeyboardInterrupt:
        print("featinv-pl: interrupted", file=sys.stderr)
        sys.exit(130)


def _check_home() -> None:
    """Refuse to start where caches and settings have no place: containers give users numbers that nobody knows."""
    try:
        Path.home()
    except RuntimeError as error:
        raise UserError(
            f"HOME: user {os.getuid()} has no entry in passwd, so it has no home folder. Set HOME to one that it "
            "may write to."
        ) from error


@contextmanager
def _log_shown() -> Iterator[None]:
    """Show on stderr what the package logs."""
    handler, logger = logging.StreamHandler(), logging.getLogger(__package__)
    handler.setFormatter(logging.Formatter("featinv-pl: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _nobody_reads() -> bool:
    """Whether standard output is a pipe whose reader has ended, such as `head`."""
    output = select.poll()
    output.register(1, 0)
    return any(event & select.POLLERR for _, event in output.poll(0))


def run(args: list[str]) -> None:
    """Run one command and let its errors pass.

    Libraries are imported by the command that needs them: help and errors should not wait for torch.
    """
    args = [re.sub(r"^(--[\w.+-]+=)?~(?=/)", rf"\g<1>{Path.home()}", arg) for arg in args]  # as shells do not after `=`
    command = args[0] if args else "--help"
    if command in TRAINER_COMMANDS or command in ("-c", "--config"):
        from featinv_pl.cli import train

        train(overlaid(args, os.environ.get(OVERLAY)))
    elif command in OWN_COMMANDS:
        own = OWN_COMMANDS[command]
        parser = ArgumentParser(f"featinv-pl {command}", description=f"{own.does[0].upper()}{own.does[1:]}.")
        with options_spelled(lambda: re.findall(r"--[\w.]+", parser.format_usage())):
            own.run(parser, args[1:])
    elif command == "--version":
        print(version("featinv-pl"))
    elif command in ("-h", "--help"):
        print(_usage(), end="")
    else:
        raise UserError(f"there is no command '{command}'. `featinv-pl --help` lists them.")


def overlaid(args: list[str], overlay: str | None) -> list[str]:
    """A command line with one more `--config` after its last one: over all files, beneath all options.

    An agent of W&B starts commands that somebody else has written; its environment is what its user can choose.
    """
    if not overlay:
        return args
    places = [number for number, arg in enumerate(args) if arg.split("=")[0] in ("-c", "--config")]
    end = places[-1] + (1 if "=" in args[places[-1]] else 2) if places else 1
    return [*args[:end], "--config", overlay, *args[end:]]


def _verify(parser: ArgumentParser, args: list[str]) -> None:
    parser.add_argument("folder", type=Path, nargs="+", help="a shard set, or a folder of some")
    options = parser.parse_args(args)
    from featinv_pl.data.shards.verification import verify

    results = [verify(folder) for folder in options.folder]
    if not all(results):
        sys.exit(1)


def _report(parser: ArgumentParser, args: list[str]) -> None:
    parser.add_argument("folder", type=Path, help="holds one folder per inverter, as `test` has left it")
    options = parser.parse_args(args)
    from featinv_pl.evaluation.report import report

    report(options.folder)
    print(f"Open {options.folder / 'report.html'}.")


def _study(parser: ArgumentParser, args: list[str]) -> None:
    parser.add_argument("plan", metavar="PLAN", type=Path, help="a YAML file, such as experiments/study/digits.yaml")
    parser.add_argument("--jobs", type=positive, default=1, help="runs at the same time (%(default)s)")
    parser.add_argument("--config", type=Path, help="an overlay for every run, such as experiments/debug.yaml")
    options = parser.parse_args(args)
    from featinv_pl.study import study

    if not study(options.plan, options.jobs, options.config):
        sys.exit(1)


def _demo(parser: ArgumentParser, args: list[str]) -> None:
    parser.add_argument("--fresh", action="store_true", help="start over instead of reusing stages that are done")
    parser.add_argument("--config", type=Path, help="an overlay for every stage, such as experiments/debug.yaml")
    options = parser.parse_args(args)
    from featinv_pl.demo import demo

    demo(options.fresh, options.config)


def _export(parser: ArgumentParser, args: list[str]) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="the folder of a run of `fit`, or a checkpoint in it")
    parser.add_argument("out", metavar="OUT", type=Path, help="a new folder")
    options = parser.parse_args(args)
    from featinv_pl.publishing import export

    export(options.run, options.out)


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

    import_official(options.pop("checkpoint"), options.pop("out"), **options)


def _reconstruct(parser: ArgumentParser, args: list[str]) -> None:
    parser.add_argument("--model", required=True, help="a folder that `export` or `import` wrote, or its hub name")
    parser.add_argument("images", metavar="IMAGE", type=Path, nargs="+")
    parser.add_argument("--out", required=True, type=folder, help="the folder for PNGs and the contact sheet")
    parser.add_argument("--num_samples", type=positive, default=4, help="reconstructions of each image (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (%(default)s)")
    parser.add_argument("--precision", choices=("32", "bf16"), default="32", help="bf16 is faster, and rounds")
    _add_sampler(parser)
    options = parser.parse_args(args)
    from featinv_pl.explore.reconstruct import reconstruct

    pipeline = load_pipeline(options.model, options.precision)
    pipeline.with_sampler(**_sampler_changes(options))
    reconstruct(pipeline, options.images, options.out, options.num_samples, options.seed)


def _add_sampler(parser: ArgumentParser) -> None:
    """Let a command change how a model draws; what is not given stays as the model has it."""
    group = parser.add_argument_group("sampler", "How images are drawn, where it is not to be as the model has it.")
    group.add_argument("--sampler.scheduler", choices=("ddim", "dpm", "unipc"), help="the solver")
    group.add_argument("--sampler.steps", type=positive, metavar="N", help="denoising steps")
    group.add_argument("--sampler.guidance", choices=("text", "features", "both"), help="what guides")
    group.add_argument("--sampler.guidance_scale", type=float, metavar="S", help="how much; 1 is not at all")
    group.add_argument("--sampler.control_scale", type=float, metavar="S", help="0 is the bare prior")
    group.add_argument("--sampler.best_of", type=positive, metavar="N", help="candidates, of which the best is kept")
    group.add_argument("--sampler.refine", type=positive, metavar="N", help="gradient steps at each denoising step")


def _sampler_changes(options: Namespace) -> dict[str, Any]:
    """The fields of the sampler that were given."""
    from featinv_pl.sampling.sampler import Refinement

    prefix = "sampler."
    changes = {name.removeprefix(prefix): value for name, value in vars(options).items() if name.startswith(prefix)}
    if changes["refine"] is not None:
        changes["refine"] = Refinement(changes["refine"])
    return {name: value for name, value in changes.items() if value is not None}


OWN_COMMANDS = {
    "verify": Command(_verify, "check feature shards against their manifest"),
    "reconstruct": Command(_reconstruct, "reconstruct pictures from their feature maps"),
    "export": Command(_export, "write a trained inverter as a folder to publish"),
    "import": Command(_import, "write the authors' checkpoint as a folder to publish"),
    **COMMANDS,
    "report": Command(_report, "one page of pictures, tables and curves from scored inverters"),
    "study": Command(_study, "compare ways of training and sampling, over several seeds"),
    "demo": Command(_demo, "all of the above on handwritten digits"),
}


def _usage() -> str:
    does = {**TRAINER_COMMANDS, **{name: command.does for name, command in OWN_COMMANDS.items()}}
    return "\n".join(
        [
            "usage: featinv-pl COMMAND [options]\n",
            "Reconstruct natural images from a classifier's spatial feature map (FeatInv).\n",
            *(f"  {name:11}  {text}" for name, text in does.items()),
            "\n`featinv-pl COMMAND --help` lists the options of each; `featinv-pl --version` prints the version.",
            f"{OVERLAY}=FILE in the environment lays a file over the configuration of the first four.\n",
        ]
    )


if __name__ == "__main__":
    main()
