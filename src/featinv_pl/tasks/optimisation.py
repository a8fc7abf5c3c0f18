"""How the LightningModules are optimised: factories from the configuration, applied to what trains."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypedDict

from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from featinv_pl.errors import UserError

OptimizerFactory = Callable[[Iterable[Parameter]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]


class _Schedule(TypedDict):
    scheduler: LRScheduler
    interval: str


class Optimisation(TypedDict, total=False):
    """The return value of Lightning's `configure_optimizers`."""

    optimizer: Optimizer
    lr_scheduler: _Schedule


def optimise(
    parameters: Iterable[Parameter], optimizer: OptimizerFactory, lr_scheduler: SchedulerFactory | None
) -> Optimisation:
    """Build an optimizer over `parameters`, and a learning rate schedule that advances every step.

    Raises:
        UserError: The schedule waits for a metric.
    """
    built = optimizer(parameters)
    if lr_scheduler is None:
        return {"optimizer": built}
    scheduler = lr_scheduler(built)
    if isinstance(scheduler, ReduceLROnPlateau):
        raise UserError(
            "`lr_scheduler`: ReduceLROnPlateau waits for a metric, and schedules advance with every step here. "
            "Use another, such as torch.optim.lr_scheduler.OneCycleLR, and EarlyStopping for the end."
        )
    return {"optimizer": built, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def plain(factory: Any) -> Any:
    """A factory that the command line has made, without the rest of that: it can be copied and pickled then."""
    if isinstance(factory, partial) and factory.args and isinstance(made := factory.args[-1], type):
        return partial(made, **factory.keywords)
    return factory
