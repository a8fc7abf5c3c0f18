"""Pictures and tables for the loggers that take some: what W&B and TensorBoard each make of them.

Callbacks hand everything to every logger and know none of them. Another logger takes part once its
functions are registered here; until then it gets nothing but scalars and the configuration.
"""

from functools import singledispatch
from typing import Any

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
"""(H, W, 3) bytes: W&B takes floats in [0, 1] for bytes and shows black."""


def last_step(trainer: Trainer) -> int:
    """The step under which Lightning logs scalars at this moment: it counts those of training from 0."""
    return max(trainer.global_step - 1, 0)


@singledispatch
def log_picture(logger: Logger, name: str, pixels: Pixels, caption: str, step: int) -> None:
    """Log a picture. Loggers of figures alone, such as CSVLogger, leave it out.

    Args:
        logger: Any of Lightning's.
        name: Where it belongs, such as `reconstructions/val/first`.
        pixels: (H, W, 3) bytes.
        caption: What it shows.
        step: That of `last_step`.
    """


@log_picture.register
def _(logger: WandbLogger, name: str, pixels: Pixels, caption: str, step: int) -> None:
    logger.log_image(name, [pixels], step, caption=[caption])


@log_picture.register
def _(logger: TensorBoardLogger, name: str, pixels: Pixels, caption: str, step: int) -> None:
    logger.experiment.add_image(name, pixels, step, dataformats="HWC")
    logger.experiment.add_text(f"{name}/caption", caption, step)


@singledispatch
def log_table(logger: Logger, name: str, table: list[list[str]], caption: str, step: int) -> None:
    """Log a table. Loggers of figures alone, such as CSVLogger, leave it out.

    Args:
        logger: Any of Lightning's.
        name: Where it belongs, such as `scores/test`.
        table: The head, then the rows.
        caption: What it shows.
        step: That of `last_step`.
    """


@log_table.register
def _(logger: WandbLogger, name: str, table: list[list[str]], caption: str, step: int) -> None:
    # A panel of W&B that shows a table has a title, its name, and no caption.
    logger.log_table(name, columns=table[0], data=table[1:], step=step)


@log_table.register
def _(logger: TensorBoardLogger, name: str, table: list[list[str]], caption: str, step: int) -> None:
    head, *rows = table
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    writer: Any = logger.experiment
    writer.add_text(name, "\n".join([f"{caption}\n", *lines]), step)
