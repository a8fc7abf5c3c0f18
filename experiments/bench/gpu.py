"""What a GPU does with all of it, in at most ten minutes: `make gpu`, on any machine with CUDA.

make gpu

Weights and samples are random, sizes those of the recipes. What time does not suffice for is named, not waited for.
`--short` does the same on tiny networks, on a CPU too.
"""

import json
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench import machine, sampling
from bench.__main__ import OUT, print_table, tiny_options
from bench.full_size import write_prior
from bench.training import Stopwatch
from featinv_pl.__main__ import run
from featinv_pl.nets.frozen import keep_products_in
from featinv_pl.sampling.sampler import AUTHORS, Sampler
from featinv_pl.tasks.inversion import FeatureInversion
from featinv_pl.trust import allow_imports
from tiny import make_classifier, make_prior

EXPERIMENTS = Path(__file__).parents[1]
TRAIN = EXPERIMENTS / "imagenet" / "train"
MAPS = {"resnet50": (2048, 7, 7), "convnext": (1024, 9, 9), "swinv2": (1024, 12, 12)}
TESTS = [
    "tests/nets/test_control.py",
    "tests/nets/test_precision.py",
    "tests/sampling",
    "tests/tasks/test_inversion.py",
]
CHANNELS_LAST, COMPILE, AGAIN = (
    f"--model.execution.{name}" for name in ("channels_last", "compile", "activation_checkpointing")
)
LIMIT = 1e-2  # relative difference of a GPU's images from the CPU's, in fp32


def main(args: Sequence[str] | None = None) -> None:
    """Measure part by part, print each table, and write all figures as JSON."""
    parser = ArgumentParser("gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="after which nothing new is begun (%(default)s)")
    parser.add_argument("--short", action="store_true", help="tiny networks, on a CPU too, without the tests")
    options = parser.parse_args(args)
    if not machine.GPU and not options.short:
        sys.exit("gpu: torch finds no CUDA device. `make gpu SHORT=1` tries all of this on tiny networks.")
    OUT.mkdir(parents=True, exist_ok=True)
    small: list[str] = []
    if options.short:
        small = tiny_options(make_classifier(OUT), make_prior(OUT))
    elif not (OUT / "prior").is_dir():
        write_prior(OUT / "prior")
    end = time.monotonic() + 60 * options.minutes
    found: dict[str, Any] = {"machine": machine.describe()}
    print(", ".join(f"{name} {value}" for name, value in found["machine"].items()))
    allow_imports()
    parts: dict[str, Callable[[list[str]], Iterator[tuple[str, dict[str, Any]]]]] = {
        "the same images as on the CPU": same_images,
        "training, by batch and execution": speeds,
        "sampling": samples,
        "one step of every recipe": recipes,
        "tests": tests,
    }
    for name, measure in parts.items():
        rows: dict[str, dict[str, Any]] = {}
        for title, figures in measure(small):
            rows[title] = figures
            if time.monotonic() > end:
                print(f"\n{name}: the time is up after '{title}'")
                break
        found[name] = rows
        heads = list(dict.fromkeys(head for figures in rows.values() for head in figures))
        table = [(title, *(_shown(figures.get(head)) for head in heads)) for title, figures in rows.items()]
        print_table(name, ("what", *heads), table)
        (OUT / "gpu.json").write_text(json.dumps(found, indent=2) + "\n")
        if time.monotonic() > end:
            break
    print(f"\nAll figures: {OUT / 'gpu.json'}")


def same_images(small: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Images of the GPU against those of the CPU, from the same noise in fp32, and the GPU's own a second time."""
    model = _model(small)
    inverter = model.inverter
    torch.manual_seed(1)
    features = torch.randn(1, *inverter.classifier.feature_shape)
    noise = torch.randn(1, *inverter.prior.latent_grid(inverter.image_size))
    steps = Sampler(steps=4)
    expected = inverter.reconstruct_from(features, noise, steps)
    model.to(machine.DEVICE)
    first, again = (inverter.reconstruct_from(features.to(model.device), noise.to(model.device), steps) for _ in "12")
    difference = float((first.cpu() - expected).norm() / expected.norm())
    if difference > LIMIT:
        sys.exit(f"gpu: images differ from the CPU's by {difference:.1e}, and at most {LIMIT:.0e} was expected")
    yield "4 steps, fp32", {"difference": difference, "between two runs": float((first - again).norm())}


def speeds(small: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Training by batch size, memory layout and compilation, and the recipes for small GPUs."""
    rate = machine.product_rates()["bfloat16"]
    sizes = (1, 2, 3) if small else (8, 64, 128)
    middle = sizes[1]
    rows: dict[str, tuple[int, list[str]]] = {f"batches of {size}": (size, []) for size in sizes}
    rows |= {
        f"batches of {middle}, channels_last off": (middle, [f"{CHANNELS_LAST}=false"]),
        f"batches of {sizes[0]}, compiled": (sizes[0], [f"{COMPILE}=true"]),
        f"batches of {middle}, compiled": (middle, [f"{COMPILE}=true"]),
        "memory/12gb.yaml": (sizes[0], [f"{AGAIN}=true"]),
        "memory/24gb.yaml": (sizes[1] if small else 16, []),
    }
    flops = 0.0  # a sample's, which compiled networks do not tell
    for title, (size, more) in rows.items():
        if small and "compiled" in title:
            continue  # takes minutes on a CPU
        try:
            _train("resnet50-spatial", size, [*small, *more])
        except torch.OutOfMemoryError:
            yield title, {"samples/s": "out of memory"}
            continue
        flops = flops or Stopwatch.flops / size
        speed = size / median(Stopwatch.seconds)
        yield title, {"samples/s": speed, "of a product": flops * speed / rate, "peak GiB": Stopwatch.peak}


def samples(small: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Reconstructions in bf16, by the authors' sampler and by ours."""
    model, size = _model(small), 2 if small else 16
    keep_products_in(model.inverter.prior, torch.bfloat16)
    inverter = model.to(machine.DEVICE).inverter
    features = torch.randn(size, *inverter.classifier.feature_shape, device=machine.DEVICE)
    noise = torch.randn(size, *inverter.prior.latent_grid(inverter.image_size), device=machine.DEVICE)
    ours = Sampler(steps=3) if small else Sampler()
    sampling.in_bf16(model, features, noise, Sampler(steps=2))  # the first call is slower
    for title, sampler in {"the authors'": Sampler("ddim", 4) if small else AUTHORS, "ours": ours}.items():
        seconds = machine.timed(lambda sampler=sampler: sampling.in_bf16(model, features, noise, sampler))  # type: ignore[misc]
        yield f"{title}, batches of {size}", {"steps": sampler.steps, "images/s": size / seconds}


def recipes(small: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Two steps of every training recipe, of two samples each."""
    for path in sorted(TRAIN.glob("*.yaml")):
        _train(path.stem, 2, [*small, "--trainer.max_steps=2"])
        yield path.stem, {"seconds": Stopwatch.seconds[-1], "peak GiB": Stopwatch.peak}
        if small:
            return


def tests(small: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The tests of what a GPU computes or is handed."""
    if small:
        return
    for path in TESTS:
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", path], capture_output=True, text=True, check=False)
        yield path, {"exit code": done.returncode, "says": done.stdout.strip().splitlines()[-1]}


def _train(recipe: str, batch_size: int, more: list[str]) -> None:
    """Train a few steps of a recipe, which Stopwatch times."""
    files = (TRAIN / f"{recipe}.yaml", EXPERIMENTS / "bench" / "gpu.yaml")
    shape = f"--data.feature_shape={list(MAPS[recipe.partition('-')[0]])}"
    run(["fit", *(f"--config={file}" for file in files), shape, f"--data.batch_size={batch_size}", *more])


def _model(small: list[str]) -> FeatureInversion:
    """An inverter for ResNet50 whose control steers, though it is not trained."""
    given = dict(option.removeprefix("--model.").split("=") for option in small if option.startswith("--model."))
    sizes: dict[str, Any] = {name: int(given[name]) for name in ("input_size", "image_size") if name in given}
    return sampling.steered(
        {"backbone": given.get("backbone", "resnet50.a1_in1k"), "prior": given.get("prior", str(OUT / "prior"))}
        | {"weights": given.get("weights", "random"), **sizes}
    )


def _shown(figure: Any) -> str:
    return "" if figure is None else f"{figure:.3g}" if isinstance(figure, float) else str(figure)


if __name__ == "__main__":
    main()
