"""Clocks, memory and arithmetic of the machine at hand."""

import ctypes
import gc
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
GIB = 2**30
M_MMAP_THRESHOLD = -3  # in malloc.h
PACKAGES = ("torch", "lightning", "diffusers", "timm", "transformers")


def describe() -> dict[str, str]:
    """What figures depend on."""
    cpu = next((line for line in _lines("/proc/cpuinfo") if line.startswith("model name")), platform.processor())
    return {
        "device": torch.cuda.get_device_name() if GPU else cpu.partition(":")[2].strip(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "memory": f"{total_memory():.0f} GiB",
        "allocator": os.environ.get("LD_PRELOAD", "") or " ".join(platform.libc_ver()),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "date": time.strftime("%Y-%m-%d"),
    }


def now() -> float:
    """Seconds, after all that the device was asked to do."""
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def used() -> float:
    """Seconds that do not depend on other processes: of a GPU, as `now`; of the CPU, those of this process."""
    return now() if GPU else time.process_time()


def give_back_from(size: int) -> None:
    """Have the allocator of a CPU give memory back to the system when blocks of at least so many bytes are freed.

    By itself glibc keeps blocks of up to 32 MiB once such have been freed: faster, but what it keeps is not needed.
    """
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, size)


def start_peak() -> None:
    """Give back what is free, and forget the highest memory use so far."""
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> float:
    """The highest memory use in GiB: of the GPU, or of this process with all that it has loaded."""
    if GPU:
        return torch.cuda.max_memory_allocated() / GIB
    line = next(line for line in _lines("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / GIB


def total_memory() -> float:
    """Of the device, in GiB."""
    if GPU:
        return torch.cuda.get_device_properties(0).total_memory / GIB
    return int(_lines("/proc/meminfo")[0].split()[1]) * 1024 / GIB


def product_rates() -> dict[str, float]:
    """FLOP per second of a plain large matrix product in both precisions: the median of five each."""
    size = 8192 if GPU else 2048
    rates = {}
    for name in ("float32", "bfloat16"):
        left, right = (torch.randn(size, size, device=DEVICE).to(getattr(torch, name)) for _ in range(2))
        seconds = [timed(lambda left=left, right=right: left @ right) for _ in range(6)][1:]  # type: ignore[misc]
        rates[name] = 2 * size**3 / median(seconds)
    return rates


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    """By name, over rounds: the machine may be busier in one than in the next."""
    return {name: median(one[name] for one in rounds) for name in rounds[0]}


def timed(function: Callable[[], Any], clock: Callable[[], float] = now) -> float:
    """Seconds that a call takes."""
    start = clock()
    function()
    return clock() - start


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text().splitlines() if file.is_file() else []
