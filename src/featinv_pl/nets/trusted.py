"""The user's leave to import and call what a class path names, which may be anybody's code."""

import os

from featinv_pl.errors import UserError

IMPORTS = "FEATINV_IMPORTS"  # in the environment: packages and modules, by commas


def trusted_imports() -> list[str]:
    """The packages and modules of `FEATINV_IMPORTS`."""
    trusted = [name.strip() for name in os.environ.get(IMPORTS, "").split(",") if name.strip()]
    wrong = [name for name in trusted if not all(part.isidentifier() for part in name.split("."))]
    if wrong:
        raise UserError(f"{IMPORTS}: '{wrong[0]}' is not a package or module. Separate several by commas.")
    return trusted


def not_trusted(path: str) -> UserError:
    """The refusal of a class path whose package is not among them."""
    return UserError(
        f"not trusted: '{path}' would be imported and run, and may be anybody's code. If you trust it, "
        f"say so in the environment: {IMPORTS}={path.rpartition('.')[0] or path} (several by commas)."
    )
