"""The one exception that users are meant to read."""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

NAME = re.compile(r"`([\w./-]+)`")


class UserError(ValueError):
    """Something the user can put right.

    The message says what is wrong, what was given and what to do. The command prints it without a traceback, and exits
    with `status`. It names an argument in backticks, with its group if the name is ambiguous: `data.train`.
    """

    status = 1


class UsageError(UserError):
    """A mistake in the command line itself, such as an option that does not exist."""

    status = 2


def user_error(error: BaseException) -> UserError:
    """The message for users within an error: jsonargparse wraps what a constructor raises.

    An error with no such message is a defect, and is raised again.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return cause
        cause = cause.__cause__ or cause.__context__
    raise error


@contextmanager
def options_spelled(options: Callable[[], Iterable[str]]) -> Iterator[None]:
    """Let a command's messages name its options instead of arguments, such as `num_samples`: `--model.num_samples`.

    `options` gives those of the command, once it has failed.
    """
    try:
        yield
    except ValueError as error:
        found = user_error(error)
        raise type(found)(spelled(str(found), options())) from error


@contextmanager
def renamed(name: str, given: str) -> Iterator[None]:
    """Let errors about an argument `name` of the callee name the caller's own argument, `given`."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(f"`{name}`", f"`{given}`")) from error


def spelled(message: str, options: Iterable[str]) -> str:
    """Replace each name in backticks by its option, if exactly one option has that name."""
    known = set(options)

    def spell(name: re.Match[str]) -> str:
        fitting = {option for option in known if option.lstrip("-") == name[1] or option.endswith(f".{name[1]}")}
        least = min((option.count(".") for option in fitting), default=0)
        [*found] = (option for option in fitting if option.count(".") == least)
        return found[0] if len(found) == 1 else name[0]

    return NAME.sub(spell, message)


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence that asks for the known name most like `name`, with a space before it; empty if none is.

    Of names with dots, the last parts are compared first: `--model.lr` may stand for `--model.optimizer.lr`.
    """

    def last(one: str) -> str:
        return one.rpartition(".")[2].lstrip("-").lower()

    [*names] = known
    close = difflib.get_close_matches(last(name), {last(one) for one in names}, n=1)
    fitting = [one for one in names if last(one) in close]
    found = difflib.get_close_matches(name, fitting, n=1, cutoff=0)
    return f" Did you mean {found[0]}?" if found else ""


def reason(error: BaseException, longest: int = 300) -> str:
    """The first line of an error's text, or the name of its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:longest]
