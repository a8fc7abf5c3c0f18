"""Pictures and tables for the loggers that accept them: W&B and TensorBoard.

Another logger takes part once its functions are registered here; until then it gets scalars and the configuration only.
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
    """Log a picture at the step that `last_step` returns. Loggers of scalars only, such as CSVLogger, ignore it."""


@log_picture.register
def _(logger: WandbLogger, name: str, pixels: Pixels, caption: str, step: int) -> None:
    logger.log_image(name, [pixels], step, caption=[caption])


@log_picture.register
def _(logger: TensorBoardLogger, name: str, pixels: Pixels, caption: str, step: int) -> None:
    logger.experiment.add_image(name, pixels, step, dataformats="HWC")
    logger.experiment.add_text(f"{name}/caption", caption, step)


@singledispatch
def log_table(logger: Logger, name: str, table: list[list[str]], caption: str, step: int) -> None:
    """Log a table, head first, likewise."""


@log_table.register
def _(logger: WandbLogger, name: str, table: list[list[str]], caption: str, step: int) -> None:
    # W&B's panel of a table has a title, its name, and no caption.
    logger.log_table(name, columns=table[0], data=table[1:], step=step)


@log_table.register
def _(logger: TensorBoardLogger, name: str, table: list[list[str]], caption: str, step: int) -> None:
    head, *rows = table
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    writer: Any = logger.experiment
    writer.add_text(name, "\n".join([f"{caption}\n", *lines]), step)
