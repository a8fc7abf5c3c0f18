"""To be removed once no module imports from here."""

from featinv_pl.nets.ldm import *  # noqa: F403
