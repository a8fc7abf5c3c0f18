"""Counts what a GPU would do, without one: operations on tensors that have a device and a shape, but no values."""

import weakref
from collections import Counter
from dataclasses import dataclass, field
from math import ceil
from typing import Any, Self

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

aten = torch.ops.aten
CHUNK, CHUNKS = 65536, 320  # elements and blocks of one launch over a list of tensors (multi_tensor_apply of torch)
NO_KERNEL = {aten._unsafe_view, aten.lift_fresh, aten.detach, aten.alias, aten.view, aten._reshape_alias}
NO_KERNEL |= {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten.set_}
READ = {aten._local_scalar_dense, aten.item, aten.is_nonzero}
WAITING = READ | {aten.nonzero, aten.masked_select, aten.equal}
COPIES = {aten._to_copy, aten.copy_, aten._foreach_copy_}
MEANWHILE = 500  # kernels that keep a GPU busy while the host reads what came before
SMALL = 1024  # elements of tensors whose values are kept, such as those of a noise schedule

VALUES = WeakTensorKeyDictionary()


@dataclass
class Counts:
    """What was counted.

    Attributes:
        kernels: Launches; each operation of torch is one, but for gradients of a convolution and lists of tensors.
        flops: By torch's own formulas, of products and convolutions.
        bytes: Inputs and outputs of all kernels.
        conversions: Kernels that change the dtype.
        synchronisations: Times at which the host waits for the GPU, by what it waits for.
        collectives: Times at which ranks wait for each other, but for gradients.
        saved: Bytes of activations that wait for the backward pass.
    """

    kernels: Counter[str] = field(default_factory=Counter)
    flops: int = 0
    bytes: Counter[str] = field(default_factory=Counter)
    conversions: int = 0
    synchronisations: Counter[str] = field(default_factory=Counter)
    collectives: Counter[str] = field(default_factory=Counter)
    saved: int = 0

    def less(self, other: Self, parts: int) -> Self:
        """What is here and not there, of one of so many parts; synchronisations are not divided."""
        made = type(self)(
            flops=(self.flops - other.flops) // parts, conversions=(self.conversions - other.conversions) // parts
        )
        for name in ("kernels", "bytes"):
            own, others = getattr(self, name), getattr(other, name)
            setattr(made, name, Counter({key: (own[key] - others[key]) // parts for key in own}))
        made.synchronisations = self.synchronisations - other.synchronisations
        return made

    def row(self, samples: int) -> dict[str, float]:
        """Figures for a table; a step of training has saved activations and collectives."""
        return {
            "kernels": self.kernels.total(),
            "GFLOP a sample": self.flops / samples / 1e9,
            "GB a sample": self.bytes.total() / samples / 1e9,
            "conversions": self.conversions,
            "saved GiB a sample": self.saved / samples / 2**30,
            "synchronisations": self.synchronisations.total(),
            "collectives": self.collectives.total(),
        }


class Counted(TorchDispatchMode):
    """Counts within itself, and computes the few small values that the host asks for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts = Counts()
        self.live = 0
        self.known: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return func(*args, **kwargs)
        packet = func.overloadpacket
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        on_gpu = any(one.device.type == "cuda" for one in given)
        if func.namespace == "c10d":
            self.counts.collectives[packet.__name__] += 1
            for one in given:
                if not one.is_floating_point():  # sums of two ranks; numbers are averaged
                    VALUES[one] = 2 * value_of(one)
        elif given and (waited := self._waits(packet, args, kwargs, given, on_gpu)):
            self.counts.synchronisations[waited] += 1
        kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}  # there is no driver to ask
        if packet in READ:
            with unset_fake_temporarily(), _disable_current_modes():
                value = value_of(given[0]).item()
            return bool(value) if packet is aten.is_nonzero else value
        if packet is aten.nonzero:
            with unset_fake_temporarily(), _disable_current_modes():
                places = value_of(given[0]).nonzero()
            found = torch.empty(places.shape, dtype=places.dtype, device=given[0].device)
            VALUES[found] = places
            return found
        if packet is aten.index and on_gpu and _masks(given):
            return args[0].flatten(0, given[1].ndim - 1).clone()  # as if all were meant
        made = func(*args, **kwargs)
        results = [one for one in tree_leaves(made) if isinstance(one, Tensor)]
        if func.namespace != "c10d":
            _remember(func, args, kwargs, results)
        if on_gpu or any(one.device.type == "cuda" for one in results):
            self._note(results)
            self._count(func, packet, args, kwargs, given, made, results)
        return made

    @staticmethod
    def _waits(packet: Any, args: Any, kwargs: Any, given: list[Tensor], on_gpu: bool) -> str:
        """What the host waits for, if it does."""
        if packet is aten._to_copy and (to := kwargs.get("device")) is not None:
            return f"copy to {to.type}" if to.type != given[0].device.type and not kwargs.get("non_blocking") else ""
        if packet is aten.copy_:
            far = args[0].device != args[1].device and not any(args[2:]) and not kwargs.get("non_blocking")
            return f"copy to {args[0].device.type}" if far else ""
        if not on_gpu:
            return ""
        if packet is aten.index and _masks(given):
            return "boolean index"
        return packet.__name__ if packet in WAITING else ""

    def _count(
        self, func: Any, packet: Any, args: Any, kwargs: Any, given: list[Tensor], made: Any, results: list[Tensor]
    ) -> None:
        if packet in NO_KERNEL or func.is_view or _is_view(func):
            return
        counts, name = self.counts, packet.__name__
        if packet in flop_registry:
            counts.flops += flop_registry[packet](*args, **kwargs, out_val=made)
        if packet is aten.convolution_backward:
            gradient, inputs, weight = args[:3]
            for part, of in zip(made, ((gradient, weight), (gradient, inputs), (gradient,)), strict=True):
                if part is not None:
                    self._kernel(name, [*of, part])
            return
        if packet in COPIES and len({one.dtype for one in (*given, *results)}) > 1:
            counts.conversions += 1
        launches = 1
        if name.startswith(("_foreach", "_fused")):
            lists = [one for one in args if isinstance(one, (list, tuple)) and one]
            launches = ceil(sum(ceil(one.numel() / CHUNK) for one in lists[0]) / CHUNKS)
        self._kernel(name, [*given, *results], launches)

    def _kernel(self, name: str, tensors: list[Tensor], launches: int = 1) -> None:
        self.counts.kernels[name] += launches
        on_gpu = {id(one): one for one in tensors if one.device.type == "cuda"}.values()
        self.counts.bytes[name] += sum(min(one.nbytes, one.untyped_storage().nbytes()) for one in on_gpu)

    def _note(self, results: list[Tensor]) -> None:
        for one in results:
            if one.device.type == "cuda" and (storage := one.untyped_storage())._cdata not in self.known:
                self.known[storage._cdata] = storage
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, size: int) -> None:
        self.live -= size


def _masks(given: list[Tensor]) -> bool:
    return any(one.dtype in (torch.bool, torch.uint8) for one in given[1:])


def value_of(tensor: Tensor) -> Tensor:
    """The values of a small tensor; ones if they came from a large one."""
    if not isinstance(tensor, FakeTensor):
        return tensor
    if tensor not in VALUES:
        with unset_fake_temporarily(), _disable_current_modes():
            VALUES[tensor] = torch.ones(tensor.shape, dtype=tensor.dtype)
    value: Tensor = VALUES[tensor]
    return value


def _remember(func: Any, args: Any, kwargs: Any, results: list[Tensor]) -> None:
    """Compute small results for real, on the CPU."""
    small = [one for one in tree_leaves((args, kwargs, results)) if isinstance(one, Tensor)]
    if (
        not results
        or any(one.numel() > SMALL or one.is_meta for one in small)
        or func.overloadpacket is aten.set_
        or func.namespace != "aten"
    ):
        return
    with unset_fake_temporarily(), _disable_current_modes():
        args, kwargs = tree_map(lambda one: value_of(one) if isinstance(one, Tensor) else one, (args, kwargs))
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        made = func(*args, **kwargs)
    for one, value in zip(results, tree_leaves(made), strict=True):
        if isinstance(one, FakeTensor):
            VALUES[one] = value


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return any(one.alias_info is not None and not one.alias_info.is_write for one in returns)
