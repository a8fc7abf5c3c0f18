"""Draws what W&B is sent by a run on digits that is interrupted and continued, and by a small sweep.

The server is that of the tests, so that no account is needed: what is drawn is what arrived there. `--short` is for
runs of a few steps.
"""

import io
import os
import shutil
import sys
from itertools import product
from pathlib import Path
from typing import Any, cast

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from featinv_pl.__main__ import main
from wandb_server import Run, serve

FOLDER = Path("runs/wandb-picture")
DIGITS = ["--config", "experiments/digits/spatial.yaml", "--config", "experiments/sweeps/digits.yaml"]
SHORT = "--short" in sys.argv
STEPS = 2 if SHORT else 300  # of each part
DIGITS += ["--config", "experiments/debug.yaml"] * SHORT
CURVES = ("train/loss", "val/cosine", "train/samples_per_second")
SCALES, SCHEDULERS = (1.0, 2.0, 4.0), ("ddim", "dpm")
SWEEP = list(product(SCHEDULERS, SCALES))


def work() -> None:
    """A run in two parts, and some runs of the sweep over guidance."""
    options, last = [f"--trainer.default_root_dir={FOLDER}"], ["--ckpt_path", f"{FOLDER}/inversion.ckpt"]
    main(["fit", *DIGITS, *options, f"--trainer.max_steps={STEPS}"])
    main(["fit", *DIGITS, *options, f"--trainer.max_steps={2 * STEPS}", *last])
    for scheduler, scale in SWEEP:
        options = [f"--model.sampler.scheduler={scheduler}", f"--model.sampler.guidance_scale={scale}"]
        options += [f"--trainer.default_root_dir={FOLDER}/{scheduler}-{scale}", "--model.sampler.guidance=features"]
        main(["validate", *DIGITS, *options, *last])


def draw(run: Run, tried: dict[tuple[str, float], Run]) -> Figure:
    """Curves of the run, its last pictures, and the scores of the sweep."""
    figure = Figure(figsize=(12, 6.2), layout="constrained")
    top, bottom = cast(Any, figure.subfigures(2, 1, height_ratios=[1, 1.1]))
    for axes, metric in zip(top.subplots(1, 3), CURVES, strict=True):
        rows = [row for row in run.history if metric in row]
        axes.plot([row["trainer/global_step"] for row in rows], [row[metric] for row in rows], marker=".")
        axes.axvline(STEPS, color="grey", linestyle=":")
        axes.set(title=metric, xlabel="trainer/global_step")
    left, right = bottom.subplots(1, 2, width_ratios=[2, 1])
    picture = run.values("reconstructions/val/first")[-1]
    left.imshow(Image.open(io.BytesIO(run.files[picture["filenames"][0]])), interpolation="nearest")
    left.set(title="reconstructions/val/first", xlabel=picture["captions"][0], xticks=[], yticks=[])
    for scheduler in SCHEDULERS:
        scores = [tried[scheduler, scale].summary["val/cosine"] for scale in SCALES]
        right.plot(SCALES, scores, marker="o", label=scheduler)
    right.set(title="six runs: val/cosine", xlabel="model.sampler.guidance_scale")
    right.legend()
    return figure


if __name__ == "__main__":
    shutil.rmtree(FOLDER, ignore_errors=True)
    with serve() as server:
        os.environ.update({**server.environment(), "WANDB_SILENT": "true"})
        work()
        trained, *swept = server.runs.values()
    picture = io.BytesIO()
    FigureCanvasAgg(draw(trained, dict(zip(SWEEP, swept, strict=True)))).print_png(picture)
    Image.open(picture).quantize(128).save(sys.argv[1], optimize=True)
