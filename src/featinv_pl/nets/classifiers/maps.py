"""Feature maps within a network: which layer returns the last one, and its layout."""

from collections import deque
from collections.abc import Callable
from functools import partial
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

MAX_PREFIX_TOKENS = 8  # class, distillation and register tokens; no timm model has more
LAST = 16  # maps that are kept while the last one is looked for; those of a head come after it

Call = Callable[[Tensor], Any]


def output_of(layer: str, model: nn.Module, call: Call, images: Tensor) -> tuple[Any, Any]:
    """What a layer returns while a network runs, at the last of its calls, and what the network returns."""
    outputs: list[Any] = []
    with model.get_submodule(layer).register_forward_hook(lambda _module, _inputs, output: outputs.append(output)):
        result = call(images)
    return _main(outputs[-1]) if outputs else None, result


def find_layer(model: nn.Module, call: Call, images: Tensor) -> tuple[str | None, Any]:
    """The name of the layer that returns the last spatial map before the logits, if there is one, and the logits.

    A map has several channels, more than one location and about the aspect ratio of the image. One whose mean over
    locations is the logits is theirs, not a feature map.

    Args:
        model: The network.
        call: Runs it, and returns logits.
        images: (B, 3, H, W) that are not all alike; with two of them, windows of a transformer are no batch.
    """
    height, width = images.shape[-2:]
    maps: deque[tuple[str, Tensor]] = deque(maxlen=LAST)
    whole: list[Tensor | None] = []  # that of a tower as it is published, whose head may have maps of its own

    def keep(name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        given = _main(output) if name else getattr(output, "last_hidden_state", None)
        found = as_map(given, len(images), model, (height, width))
        if not name:
            whole.append(found)
        elif found is not None and found.shape[1] > 1 and found[0, 0].numel() > 1 and _fits(found, images):
            maps.append((name, found))

    hooks = [module.register_forward_hook(partial(keep, name)) for name, module in model.named_modules()]
    try:
        logits = call(images)
    finally:
        for hook in hooks:
            hook.remove()
    published = whole[-1] if whole else None
    for name, found in reversed(maps):
        if published is not None and (found.shape != published.shape or not torch.equal(found, published)):
            continue
        mean = found.mean((2, 3))
        if not isinstance(logits, Tensor) or mean.shape != logits.shape or not torch.allclose(mean, logits, atol=1e-5):
            return name, logits
    return None, logits


def _main(output: Any) -> Any:
    """The part of what a layer returns that the next one reads, where it returns several."""
    if isinstance(output, tuple) and output:
        return output[0]
    return getattr(output, "last_hidden_state", output)


def _fits(found: Tensor, images: Tensor) -> bool:
    """Whether a map has the aspect ratio of the images, within one location."""
    (height, width), (h, w) = images.shape[-2:], found.shape[-2:]
    return abs(h * width - w * height) < max(height, width) and h <= height and w <= width


def as_map(output: Any, batch_size: int, model: Any, input_size: tuple[int, int]) -> Tensor | None:
    """Bring the output of a layer to (B, C, h, w).

    Args:
        output: (B, C, h, w), (B, h, w, C), or tokens (B, N, C) with or without prefix tokens.
        batch_size: Windows of a transformer are no batch.
        model: The network, asked for its layout where shapes leave it open.
        input_size: (H, W) of the input: a map has its aspect ratio.

    Returns:
        The map, or None if the output is nothing of the kind.
    """
    if not isinstance(output, Tensor) or len(output) != batch_size:
        return None
    if output.ndim == 4:
        return output.permute(0, 3, 1, 2) if _is_channels_last(output, model, input_size) else output
    if output.ndim == 3:
        declared = getattr(model, "num_prefix_tokens", 0)
        for prefix in (declared, *range(MAX_PREFIX_TOKENS + 1)):
            tokens = output[:, prefix:]
            height = isqrt(tokens.shape[1] * input_size[0] // input_size[1])
            if height and height * (height * input_size[1] // input_size[0]) == tokens.shape[1] > 1:
                grid: Tensor = tokens.unflatten(1, (height, -1))
                return grid.permute(0, 3, 1, 2)
    return None


def _is_channels_last(output: Tensor, model: Any, input_size: tuple[int, int]) -> bool:
    """Whether a map is (B, h, w, C): told by the aspect ratio, since layers within a model differ."""
    _, first, second, third = output.shape
    fits_last = first * input_size[1] == second * input_size[0]
    fits_first = second * input_size[1] == third * input_size[0]
    return fits_last if fits_last != fits_first else getattr(model, "output_fmt", None) == "NHWC"
