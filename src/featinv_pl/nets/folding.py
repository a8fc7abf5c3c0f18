"""Batch norms folded into the convolutions before them, which a frozen network need not compute one by one."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

LARGEST_ERROR = 1e-4  # relative, far above rounding and far below that of folding what should not be


@torch.inference_mode(False)  # whose parameters would have no gradients, which an attack needs
@torch.no_grad()
def fold_norms(model: nn.Module, run: Callable[[], Sequence[Tensor]]) -> int:
    """Fold the batch norms of a network in eval mode, in place; on a CPU its weights are then stored channels last.

    Args:
        model: Any network. One without batch norms after convolutions is left as it is.
        run: Runs it on an example. If what this returns then differs by more than rounding, as where somebody else
            reads a convolution's output, nothing is folded.

    Returns:
        How many norms were folded.
    """
    pairs = _pairs(model, run)
    if not pairs:
        return 0
    expected, names = run(), {module: name for name, module in model.named_modules()}
    before = [(conv, conv.weight, conv.bias) for conv, _ in pairs]
    for conv, norm in pairs:
        statistics: Any = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
        conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics)
        conv.requires_grad_(False)
        rest = nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
        model.set_submodule(names[norm], rest)
    if next(model.parameters()).device.type == "cpu":
        model.to(memory_format=torch.channels_last)
    if _agree(run, expected):
        return len(pairs)
    model.to(memory_format=torch.contiguous_format)
    for (conv, weight, bias), (_, norm) in zip(before, pairs, strict=True):
        conv.weight, conv.bias = weight, bias
        model.set_submodule(names[norm], norm)
    return 0


def _pairs(model: nn.Module, run: Callable[[], Sequence[Tensor]]) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Each convolution that is run once, with the norm that gets its very output."""
    made: dict[int, tuple[nn.Conv2d, Tensor]] = {}  # with the output, whose id is then no other's
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []
    runs: Counter[nn.Module] = Counter()

    def note_output(conv: nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> None:
        made[id(output)] = (conv, output)
        runs[conv] += 1

    def note_input(norm: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
        runs[norm] += 1
        if id(inputs[0]) in made:
            pairs.append((made[id(inputs[0])][0], norm))

    hooks = []
    for module in model.modules():
        if type(module) is nn.Conv2d:
            hooks.append(module.register_forward_hook(note_output))
        elif type(module) in (nn.BatchNorm2d, BatchNormAct2d):
            hooks.append(module.register_forward_pre_hook(note_input))
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return [(conv, norm) for conv, norm in pairs if runs[conv] == runs[norm] == 1]


def _agree(run: Callable[[], Sequence[Tensor]], expected: Sequence[Tensor]) -> bool:
    try:
        found = run()
    except RuntimeError:  # such as a view that channels last does not have
        return False
    return all(
        float((one - other).norm()) <= LARGEST_ERROR * float(other.norm())
        for one, other in zip(found, expected, strict=True)
    )
