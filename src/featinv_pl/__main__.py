"""The command: Lightning's fit, validate, test and predict, and a few of our own."""

import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from featinv_pl.errors import UserError

USAGE = """\
usage: featinv-pl COMMAND [options]

Draw natural images from a classifier's spatial feature map (FeatInv).

  fit        train a Classifier, Autoencoder, NoisePredictor or FeatureInversion
  validate   score a FeatureInversion on its validation shards
  test       score a FeatureInversion on shards of any number of sources
  predict    extract features of images into shards
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
    except UserError as error:
        print(f"featinv-pl: error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("featinv-pl: interrupted", file=sys.stderr)
        sys.exit(130)


def run(args: list[str]) -> None:
    """Run one command and let its errors pass.

    Libraries are imported by the command that needs them: help and errors should not wait for torch.
    """
    command = args[0] if args else "--help"
    if command in TRAINER_COMMANDS or command in ("-c", "--config", "--print_completion"):
        from featinv_pl.cli import train

        train(args)
    elif command in ("report", "demo"):
        from jsonargparse import auto_cli

        auto_cli(_own_command(command), args=args[1:], prog=f"featinv-pl {command}")
    elif command == "--version":
        print(version("featinv-pl"))
    elif command in ("-h", "--help"):
        print(USAGE, end="")
    else:
        raise UserError(f"there is no command '{command}'. `featinv-pl --help` lists them.")


def _own_command(name: str) -> Callable[..., Any]:
    if name == "report":
        from featinv_pl.viz.report import report

        return report
    from featinv_pl.demo import demo

    return demo


if __name__ == "__main__":
    main()
