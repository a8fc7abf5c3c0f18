"""The command: Lightning's fit, validate, test and predict, and a few of our own."""

import sys
from argparse import ArgumentParser
from importlib.metadata import version
from pathlib import Path

from featinv_pl.errors import UserError

USAGE = """\
usage: featinv-pl COMMAND [options]

Draw natural images from a classifier's spatial feature map (FeatInv).

  fit        train a Classifier, Autoencoder, NoisePredictor or FeatureInversion
  validate   score a FeatureInversion on its validation shards
  test       score a FeatureInversion on shards of any number of sources
  predict    extract features of images into shards
  verify     check feature shards against their manifest
  report     one page of pictures, tables and curves from scored inversions
  demo       all of the above on handwritten digits

`featinv-pl COMMAND --help` lists the options of each; `featinv-pl --version` prints the version.
"""
TRAINER_COMMANDS = ("fit", "validate", "test", "predict")


def main(args: list[str] | None = None) -> None:
    """Run one command; what users can put right ends as one line on stderr and exit status 1."""
    arguments = sys.argv[1:] if args is None else args
    try:
        run(arguments)
    except ValueError as error:
        # Out of a data loader's worker, torch returns the message with the worker's traceback before it.
        message = str(_user_error(error)).rpartition(f"{UserError.__name__}: ")[2].strip()
        print(f"featinv-pl: error: {message}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("featinv-pl: interrupted", file=sys.stderr)
        sys.exit(130)


def _user_error(error: BaseException) -> UserError:
    """The message for users within an error: jsonargparse wraps what a constructor raises.

    An error with no such message is a defect, and is raised again.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return cause
        cause = cause.__cause__ or cause.__context__
    raise error


def run(args: list[str]) -> None:
    """Run one command and let its errors pass.

    Libraries are imported by the command that needs them: help and errors should not wait for torch.
    """
    command = args[0] if args else "--help"
    if command in TRAINER_COMMANDS or command in ("-c", "--config"):
        from featinv_pl.cli import train

        train(args)
    elif command == "verify":
        _verify(args[1:])
    elif command == "report":
        _report(args[1:])
    elif command == "demo":
        _demo(args[1:])
    elif command == "--version":
        print(version("featinv-pl"))
    elif command in ("-h", "--help"):
        print(USAGE, end="")
    else:
        raise UserError(f"there is no command '{command}'. `featinv-pl --help` lists them.")


def _verify(args: list[str]) -> None:
    parser = ArgumentParser("featinv-pl verify", description="Check feature shards against their manifest.")
    parser.add_argument("folder", type=Path, nargs="+", help="a shard set, or a folder of some")
    options = parser.parse_args(args)
    from featinv_pl.data.verification import verify

    results = [verify(folder) for folder in options.folder]
    if not all(results):
        sys.exit(1)


def _report(args: list[str]) -> None:
    parser = ArgumentParser("featinv-pl report", description="One page of pictures, tables and curves.")
    parser.add_argument("folder", type=Path, help="holds one folder per inverter, as `test` has left it")
    options = parser.parse_args(args)
    from featinv_pl.viz.report import report

    report(options.folder)
    print(f"Open {options.folder / 'report.html'}.")


def _demo(args: list[str]) -> None:
    parser = ArgumentParser("featinv-pl demo", description="The whole job on handwritten digits.")
    parser.add_argument("--fresh", action="store_true", help="start over instead of reusing stages that are done")
    parser.add_argument("--config", type=Path, help="an overlay for every stage, such as experiments/debug.yaml")
    options = parser.parse_args(args)
    from featinv_pl.demo import demo

    demo(options.fresh, options.config)


if __name__ == "__main__":
    main()
