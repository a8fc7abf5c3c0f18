"""How long waits are shown: a line at the start, and bars, in a terminal after a second and in a log every ten."""

import sys
from typing import Any

LOGGED_S = 10  # between two lines of a log


def style(name: str, unit: str) -> dict[str, Any]:
    """Arguments of tqdm."""
    terminal = sys.stderr.isatty()
    when = {"delay": 1, "mininterval": 0.1} if terminal else {"delay": LOGGED_S, "mininterval": LOGGED_S}
    # Every update looks at the clock: tqdm's monitor would refresh bars whose updates it had told not to.
    return {"desc": name, "unit": f" {unit}", "dynamic_ncols": True, "miniters": 1, **when}


def told(command: str, what: str) -> None:
    """Tell a terminal what a command does for seconds without a bar, such as loading its libraries."""
    if sys.stderr.isatty():
        print(f"{command}: {what} ...", file=sys.stderr)
