"""The one exception that users are meant to read."""


class UserError(ValueError):
    """Something the user can put right.

    The message says what is wrong, what was given and what to do. The command prints it alone,
    without a traceback, and exits with status 1.
    """


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
