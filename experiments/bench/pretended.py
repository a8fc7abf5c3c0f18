"""A GPU that torch and Lightning believe in: autocast by the rules of CUDA, gradients, ranks, and events."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast
from unittest.mock import patch

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, distributed, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.nn import functional
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import _disable_current_modes

from bench.counts import Counted, value_of
from featinv_pl.runtime import stopping

GPU = torch.device("cuda", 0)
MEANWHILE = 500  # kernels that keep a GPU busy while the host reads what came before


def backward(loss: Tensor) -> None:
    """The gradients of a loss, without torch's engine, which would ask the driver for its streams."""
    order, seen, stack = [], set(), [(loss.grad_fn, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node is not None and node not in seen:
            seen.add(node)
            stack += [(node, True), *((one, False) for one, _ in node.next_functions)]
    waiting: dict[Any, dict[int, Tensor]] = defaultdict(dict)
    gradient: Any = torch.ones_like(loss)
    for hook in (loss._backward_hooks or {}).values():
        gradient = hook(gradient)
    waiting[loss.grad_fn][0] = gradient
    with torch.no_grad():
        for node in reversed(order):
            arrived = waiting.pop(node, {})
            metadata = cast(Any, node)._input_metadata
            gradients: list[Any] = [arrived.get(number) for number in range(len(metadata))]
            for number, (one, wanted) in enumerate(zip(gradients, metadata, strict=True)):
                if one is not None:
                    gradients[number] = one.sum_to_size(wanted.shape).to(wanted.dtype)
            if (leaf := getattr(node, "variable", None)) is not None:  # torch would copy what Python refers to
                leaf.grad = gradients[0] if leaf.grad is None else leaf.grad.add_(gradients[0])
                continue
            found, edges = _called(node, gradients)
            for gradient, (following, number) in zip(found, edges, strict=True):
                if gradient is not None and following is not None:
                    before = waiting[following].get(number)
                    waiting[following][number] = gradient if before is None else before + gradient


def _called(node: Any, gradients: list[Tensor | None]) -> tuple[list[Tensor | None], list[Any]]:
    """What a node makes of gradients, and where each goes."""
    if callable(node):
        found = node(*gradients)
        return list(found) if isinstance(found, tuple) else [found], list(node.next_functions)
    found = node.apply(*gradients)  # written in Python: it has results for what is no tensor, too
    needed = [one for one, needs in zip(found, node.needs_input_grad, strict=True) if needs]
    return needed, [edge for edge in node.next_functions if edge[0] is not None]


class Gpu(CUDAAccelerator):
    """A GPU that Lightning believes in."""

    def setup_device(self, device: torch.device) -> None: ...

    def setup(self, trainer: Trainer) -> None: ...

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    def teardown(self) -> None: ...

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return [0]

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [GPU]

    @staticmethod
    def is_available() -> bool:
        return True


class Ranks(DDPStrategy):
    """The first of two ranks; the other agrees with all that this one says, and gradients are not exchanged."""

    strategy_name = "ddp"

    def setup_distributed(self) -> None:
        if distributed.is_initialized():
            distributed.destroy_process_group()
        distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())

    def configure_ddp(self) -> None: ...

    def model_to_device(self) -> None: ...

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Of its size, and of the object itself."""
        for _ in range(2):
            distributed.broadcast(torch.zeros(1, device=GPU), src)
        return obj

    def teardown(self) -> None:
        distributed.destroy_process_group()

    @property
    def world_size(self) -> int:
        return 2


class Autocast(MixedPrecision):
    """Lightning's, whose torch.autocast would ask for a GPU."""

    def __init__(self) -> None:
        super().__init__("bf16-mixed", "cuda")

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        with autocast():
            yield

    def backward(self, tensor: Tensor, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        backward(tensor)


@contextmanager
def autocast() -> Iterator[None]:
    """As Lightning's bf16-mixed; torch.autocast itself would ask for a GPU."""
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_cache_enabled(False)
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_cache_enabled(True)


class Event:
    """Lets the host wait for what was launched before; a wait for what is long done does not count."""

    counted: Counted

    def record(self, *args: Any) -> None:
        self.launched = self.counted.counts.kernels.total()

    def synchronize(self) -> None:
        counts = self.counted.counts
        if self.launched <= counts.kernels.total() < self.launched + MEANWHILE:
            counts.synchronisations["event"] += 1


@contextmanager
def pretended_gpu() -> Iterator[Counted]:
    """Within, `cuda` is a device whose tensors have no values."""
    fused = patch.object(functional, "scaled_dot_product_attention", flash)  # which no GPU does in parts
    modern = patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    copied = patch.object(FakeTensor, "__deepcopy__", lambda one, memo: one.detach().clone(), create=True)
    Event.counted = counted = Counted()
    read = patch.object(FakeTensor, "numpy", _numpy, create=True)
    events = patch.object(torch.cuda, "Event", Event)
    rarely = patch.object(stopping, "PAUSE", 1e9, create=True)  # seconds between questions to the other ranks
    lists = patch.object(_foreach_utils, "_foreach_supported_types", [FakeTensor, nn.Parameter, Tensor])
    with read, fused, lists, modern, copied, events, rarely, FakeTensorMode(allow_non_fake_inputs=True), counted:
        yield counted


def _numpy(tensor: FakeTensor) -> Any:
    with unset_fake_temporarily(), _disable_current_modes():
        return value_of(tensor).numpy()


def to_gpu(network: nn.Module) -> None:
    """Replace weights of the `meta` device by those of a GPU: `to` cannot, of tensors without values."""
    for module in network.modules():
        for name, weight in module.named_parameters(recurse=False):
            made = torch.empty_like(weight, device=GPU)
            setattr(module, name, nn.Parameter(made, weight.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(buffer, device=GPU))


def flash(queries: Tensor, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> Tensor:
    attended: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(queries, keys, values)[0]
    return attended
