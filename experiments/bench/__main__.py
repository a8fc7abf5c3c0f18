"""Measure, print the tables, and write them as JSON beside.

make bench

Ratios are measured in one process, configurations in turn. The full size wants 19 GiB of memory, on a CPU and for
itself; `make bench FLAGS="--parts startup digits"` leaves it out.
"""

import json
import os
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import counted, digits, loops, machine, sampling, startup, training
from bench.full_size import write_prior
from configurations import effective_config
from featinv_pl.nets.control import Encoder
from featinv_pl.trust import allow_imports
from tiny import make_classifier, make_prior

PARTS = ("counted", "startup", "digits", "loops", "training", "sampling")
NEEDED = 19.0  # GiB
OUT = Path("runs/bench")


def main(args: Sequence[str] | None = None) -> None:
    """Run the parts that are asked for."""
    parser = ArgumentParser("bench", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=3, help="of everything (%(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="denoising steps of a comparison (%(default)s)")
    parser.add_argument("--long", type=int, nargs=2, default=(50, 15), help="steps of theirs and of ours, once")
    parser.add_argument("--digits_steps", type=int, default=300, help="of each curve (%(default)s)")
    parser.add_argument("--digits_config", type=Path, default=digits.CONFIG)
    parser.add_argument("--short", action="store_true", help="of tiny networks, once each")
    parser.add_argument("--option", action="append", default=[], help="of the model at full size, to make it smaller")
    options = parser.parse_args(args)
    os.environ["FEATINV_IMPORTS"] = "bench"
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    OUT.mkdir(parents=True, exist_ok=True)
    if options.short:
        options.rounds, options.steps, options.long, options.digits_steps = 1, 2, (3, 2), 2
        options.option += tiny_options(make_classifier(OUT), make_prior(OUT))
    heavy = {"loops", "training", "sampling"} & set(options.parts)
    if heavy and not options.option and machine.total_memory() < NEEDED:
        sys.exit(
            f"bench: the model at full size wants {NEEDED:.0f} GiB, and there are {machine.total_memory():.0f}. "
            "Measure the rest: --parts startup digits."
        )
    if heavy and not options.option and not (OUT / "prior").is_dir():
        print("Writing a prior with random weights ...", flush=True)
        write_prior(OUT / "prior")
    found, results = OUT / "bench.json", {"machine": machine.describe()}
    if found.is_file() and (before := json.loads(found.read_text()))["machine"] == results["machine"]:
        results = before  # other parts, measured on the same day and machine
    print(", ".join(f"{name} {value}" for name, value in results["machine"].items()))
    measures = {
        "counted": _counted,
        "startup": _startup,
        "digits": _digits,
        "loops": _loops,
        "training": _training,
        "sampling": _sampling,
    }
    for part in options.parts:
        results[part] = measures[part](options)
        found.write_text(json.dumps(results, indent=2) + "\n")
    print(f"\nAll figures: {found}")


def tiny_options(classifier: Path, prior: Path) -> list[str]:
    """What makes the model at full size as small as these parts."""
    model = {"backbone": classifier, "prior": prior, "input_size": 32, "image_size": 32}
    model |= {"weights": "pretrained", "encoder.hidden_channels": 8}
    options = [f"--model.{name}={value}" for name, value in model.items()]
    return [*options, "--data.feature_shape=[8,4,4]", "--data.image_size=32"]


def _counted(options: Any) -> dict[str, Any]:
    rows = counted.measure()
    heads = tuple(next(iter(rows.values())))
    table = [
        (name, *(f"{row[head]:.3g}" if row[head] < 1000 else f"{row[head]:.0f}" for head in heads))
        for name, row in rows.items()
    ]
    print_table("counted on tensors without values, as on a GPU in bf16", ("what", *heads), table)
    return rows


def _loops(options: Any) -> dict[str, Any]:
    found = loops.measure(options.rounds, {"tiny": loops.TINY} if options.short else loops.SIZES)
    rows = [(name, *(f"{figure:.3g}" for figure in row.values())) for name, row in found.items()]
    print_table("a training step", ("size and precision", "diffusers, s", "ours, s", "ratio"), rows)
    return found


def _startup(options: Any) -> dict[str, float]:
    seconds = startup.measure(options.rounds, OUT)
    base = next(iter(seconds.values()))
    print_table(
        "start-up", ("command", "seconds", "ratio"), [(n, f"{s:.2f}", f"{s / base:.2f}") for n, s in seconds.items()]
    )
    return seconds


def _digits(options: Any) -> dict[str, Any]:
    threads = torch.get_num_threads()
    more = ["--config", "experiments/debug.yaml"] if options.short else []
    share = digits.share(options.digits_config, more)
    losses = digits.curves(options.digits_config, options.digits_steps, list(range(options.rounds)), more)
    torch.set_num_threads(threads)
    compared = digits.compared(losses)
    digits.plot(losses, OUT / "losses.png")
    rows = [("share of forward, backward and optimizer", f"{share:.1%}")]
    rows += [(f"loss of the last third: {name}", f"{value:.5f}") for name, value in compared.items()]
    print_table(f"digits: the demo's inverter, curves in {OUT / 'losses.png'}", ("what", "value"), rows)
    return {"share": share, **compared, "losses": {name: curve.tolist() for name, curve in losses.items()}}


def _training(options: Any) -> dict[str, Any]:
    found, rates = training.measure(options.option, options.rounds, steps=2)
    first = found[0]
    rows, figures = [], []
    for number, one in enumerate(found):
        bf16 = number >= list(training.NAMES).index("bf16")
        share = one.flops * one.rate / rates["bfloat16" if bf16 else "float32"]
        row = (f"{one.rate:.3f}", f"{one.rate / first.rate:.2f}", f"{one.peak:.1f}", f"{one.peak / first.peak:.0%}")
        rows.append((training.NAMES[one.name], *row, f"{one.flops / 1e12:.2f}", f"{share:.0%}"))
        figures.append({**vars(one), "rate": one.rate, "share": share})
    heads = ("each line adds to those above", "samples/s", "ratio", "peak GiB", "ratio", "TFLOP/sample", "of a product")
    print_table(f"training at full size, batches of {first.batch_size}", heads, rows)
    print(f"a plain product: {rates['float32'] / 1e9:.0f} GFLOP/s in fp32, {rates['bfloat16'] / 1e9:.0f} in bf16")
    memory = training.recipe_memory(found)
    recipes = [(name, f"{gib:.3f}") for name, gib in memory.items()]
    print_table(
        "memory of a GPU, computed",
        ("activations, and recipes of ImageNet", "GiB"),
        recipes,
    )
    return {"product": rates, "configurations": figures, "memory": memory}


def _sampling(options: Any) -> dict[str, Any]:
    words = ["fit", f"--config={training.CONFIGS / 'full.yaml'}", *options.option]
    allow_imports()
    own = effective_config(words)["model"]["init_args"]
    names = ("backbone", "weights", "input_size", "prior", "image_size")
    ways, noise, rates = sampling.measure(
        {name: own[name] for name in names} | {"encoder": Encoder(**own["encoder"])},
        options.rounds,
        options.steps,
        16 if machine.GPU else 1,
    )
    measured, base = ways[:-1], sampling.per_image(ways[0])
    rows = []
    for way, dtype in zip(measured, ("float32",) * 3 + ("bfloat16",), strict=True):
        seconds = sampling.per_image(way)
        share = f"{way.flops / seconds / rates[dtype]:.0%}" if way.flops else ""
        rows.append((way.name, f"{seconds:.2f}", f"{base / seconds:.2f}", f"{way.difference:.1e}", share))
    heads = (f"{options.steps} steps of DDIM", "s/image", "ratio", "difference", "of a product")
    print_table("sampling at full size, guided, with decoding", heads, rows)
    long, short = options.long
    ratio = sampling.final(ways, noise, long, short)
    print(f"ours with {short} steps of DPM-Solver++ against theirs with {long} of DDIM: {ratio:.1f} times faster")
    ratios = {way.name: base / sampling.per_image(way) for way in measured}
    seconds_of = {way.name: way.seconds for way in measured}
    return {"product": rates, "seconds": seconds_of, "ratios": ratios, f"{short} against {long} steps": ratio}


def print_table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table in Markdown."""
    print(f"\n{title}\n")
    for row in (heads, ["---"] * len(heads), *rows):
        print("| " + " | ".join(row) + " |")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
