"""The one exception that users are meant to read."""


class UserError(ValueError):
    """Something the user can put right.

    The message says what is wrong, what was given and what to do. The command prints it alone,
    without a traceback, and exits with status 1.
    """
