"""The command `featinv-pl`: which command runs, and how it ends."""

import errno
import logging
import os
import re
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from signal import SIGINT, SIGPIPE
from typing import NoReturn

from featinv_pl.bars import told
from featinv_pl.commands import COMMANDS, run_command
from featinv_pl.errors import UsageError, UserError, nearest, user_error
from featinv_pl.masking import masked

OVERLAY = "FEATINV_CONFIG"
REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


def main(args: list[str] | None = None) -> None:
    """Run one command; what users can put right ends as one line on stderr and exit status 1, or 2 for its options."""
    try:
        with _log_shown():
            run(sys.argv[1:] if args is None else args)
        sys.stdout.flush()  # here, where a reader that has gone is not an error
    except ValueError as error:
        # Out of a data loader's worker, torch returns the message with the worker's traceback before it.
        found = user_error(error)
        _fail(str(found).rpartition(f"{UserError.__name__}: ")[2].strip(), found.status)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_has_gone():
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python would complain at its end
            sys.exit(128 + SIGPIPE)
        if error.errno not in REFUSALS:
            raise
        where = f" '{error.filename}'" if error.filename else ""
        advice = "Complete files are intact. Free space or fix permissions, then rerun the same command."
        _fail(f"the file system refuses{where}: {error.strerror}. {advice}")
    except KeyboardInterrupt:
        print("featinv-pl: interrupted", file=sys.stderr)
        sys.exit(128 + SIGINT)


def _fail(message: str, status: int = 1) -> NoReturn:
    """Print a message in one line, whatever a path in it contains, and exit."""
    print("featinv-pl: error:", "\\n".join(masked(message).splitlines()), file=sys.stderr)
    sys.exit(status)


def _home() -> Path:
    """The place of caches and settings, which may be missing in a container under an unknown user."""
    try:
        return Path.home()
    except RuntimeError as error:
        raise UserError(f"HOME: user {os.getuid()} has no home folder. Set HOME to one that is writable.") from error


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


def _reader_has_gone() -> bool:
    """Whether standard output is a pipe whose reader has ended, such as `head`."""
    output = select.poll()
    output.register(1, 0)
    return any(event & select.POLLERR for _, event in output.poll(0))


def run(args: list[str]) -> None:
    """Run one command and let its errors pass."""
    args = [re.sub(r"^(--[\w.+-]+=)?~(?=/)", rf"\g<1>{_home()}", arg) for arg in args]  # as shells do not after `=`
    if args[:1] == ["help"]:
        args = [*args[1:2], "--help"]
    name = args[0] if args else "--help"
    if name in ("-h", "--help"):
        print(usage(), end="")
    elif name in ("-V", "--version"):
        print(version("featinv-pl"))
    elif name == "completion":
        from featinv_pl.completion import script

        print(script())
    elif name in COMMANDS and COMMANDS[name].run:
        run_command(name, args[1:])
    elif name in COMMANDS:
        if not args[1:] and OVERLAY not in os.environ:
            raise UsageError(f"{name}: give a configuration (YAML), such as `{COMMANDS[name].example}`.")
        if not {"--help", "-h", "--print_config"} & {*args}:
            told(f"featinv-pl {name}", "loading")
        from featinv_pl.cli import train

        train(overlaid(args, os.environ.get(OVERLAY)))
    elif name.startswith("-"):
        raise UsageError(f"begin with a command: `featinv-pl COMMAND {name}`. `featinv-pl --help` lists them.")
    else:
        raise UsageError(f"there is no command '{name}'.{nearest(name, COMMANDS)} `featinv-pl --help` lists all.")


def usage() -> str:
    """The output of `featinv-pl --help`."""
    commands = "\n".join(f"  {name:11}  {command.does}" for name, command in COMMANDS.items())
    return f"""usage: featinv-pl COMMAND [options]

Reconstruct natural images from a classifier's spatial feature map (FeatInv).

{commands}

`featinv-pl help COMMAND` lists the options of each with an example; `featinv-pl -V` prints the version,
`featinv-pl completion` a script for bash that completes commands, options and names of classes by TAB.
{OVERLAY}=FILE in the environment overrides the configuration files of the first four.
"""


def overlaid(args: list[str], overlay: str | None) -> list[str]:
    """A command line with one more `--config` after its last one, which overrides files and not options.

    An agent of W&B runs command lines that a sweep's author wrote; its user can only set its environment.
    """
    if not overlay:
        return args
    places = [number for number, arg in enumerate(args) if arg.split("=")[0] in ("-c", "--config")]
    end = places[-1] + (1 if "=" in args[places[-1]] else 2) if places else 1
    return [*args[:end], "--config", overlay, *args[end:]]


if __name__ == "__main__":
    main()
