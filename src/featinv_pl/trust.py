"""Which classes a configuration may name. A guard against accidents, not a sandbox: a configuration is code."""

import re
from typing import NoReturn

from jsonargparse import set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser

from featinv_pl.errors import UsageError
from featinv_pl.masking import masked
from featinv_pl.mistakes import sentence
from featinv_pl.nets.trusted import not_trusted, trusted_imports

IMPORTABLE = (  # of torch not all: it can also load and compile what it is given
    "featinv_pl",
    "lightning",
    "pytorch_lightning",
    "timm.optim",
    "timm.scheduler",
    "torch.Tensor",
    "torch.distributed.algorithms.ddp_comm_hooks.default_hooks",
    "torch.nn",
    "torch.optim",
    "torchmetrics",
)
CALLERS = ("lightning.pytorch.cli", "pytorch_lightning.cli")  # their `instantiate_class` calls any path it is given


class Parser(LightningArgumentParser):
    """Lightning's parser, whose errors are one sentence."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with one sentence; for a class that may not be imported, it says how to trust it."""
        # The second is our own message, which the parser around that of a class wraps.
        if (denied := re.search(r"(?:Importing|not trusted:) '([\w.]+)'", message)) is not None:
            raise not_trusted(denied[1])
        if not self.exit_on_error:  # the parser of a class, whose error another one tells
            super().error(masked(message), ex)
        raise UsageError(sentence(masked(message), getattr(ex, "subcommand_parser", self).format_help())) from ex


def allow_imports() -> None:
    """Let configurations name classes, which are imported and called, of a few packages and those the user trusts."""
    set_parsing_settings(
        import_path_denylist=["*", *CALLERS],
        import_path_allowlist=[*IMPORTABLE, *trusted_imports()],
        instantiate_subclass_spec_in_any=False,  # or any class would be made where a signature says `Any`
        config_read_mode_fsspec_enabled=False,  # which Lightning turns on: a configuration is a file, no address
    )
