"""How each YAML under `experiments/` is run. One that is not named here fails a test."""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import yaml

from bench.training import AGAIN, ON_GPU, SAVINGS
from smoke.acts import benchmark, extract, pretrain, study, sweep, test, train, train_and_test
from smoke.parts import NETWORKS
from smoke.targets import PROJECT

SHIPPED = PROJECT / "experiments"
DEBUG = "debug.yaml"
PRETRAINED = (
    *(
        "digits/classifier",
        "digits/autoencoder",
        "digits/prior",
        "digits/preview",
        "study/digits/prior",
        "study/digits/judge",
    ),
    *("cifar10/classifier", "cifar10/judge", "cifar10/autoencoder"),
    *("own/classifier", "own/autoencoder", "own/prior"),
)
EXTRACTED = (
    *("digits/extract", "digits/adversarial", "study/digits/judge-shards"),
    *("own/extract", "own/corrupted"),
)
EXTRACTIONS = ("-train", "-train-authors", "", "-robustness", "-imagenet-c", "-corrupted", "-adversarial")
TAKEN_ALONG = {
    "debug.yaml": "over all files of digits/, cifar10/, own/, photos/ and study/; make demo SHORT=1",
    "imagenet/extract/sources/hub.yaml": "on a stand-in for the hub in tests/data/images/test_tars.py",
    "imagenet/extract/sources/hub-train.yaml": "there, too",
    "sweeps/run.yaml": "in the command of every sweep",
}
Act = Callable[[], str]
"""Returns what was run, and raises an error if anything is wrong."""


def jobs() -> dict[str, Act]:
    """By file, in an order in which each finds what it reads."""
    return dict([*_small_images(), *_imagenet(), *_sweeps(), *_benchmarks(), *_studies()])


def bases() -> dict[str, int]:
    """Files that lie beneath others by `base:`, and of how many jobs."""
    beneath = (base for name in jobs() for base in set(_beneath(SHIPPED / name)))
    return Counter(base.relative_to(SHIPPED.resolve()).as_posix() for base in beneath)


def _beneath(path: Path) -> Iterator[Path]:
    given = yaml.safe_load(path.read_text()).get("base", [])
    for name in given if isinstance(given, list) else [given]:
        base = (path.parent / name).resolve()
        yield base
        yield from _beneath(base)


def _small_images() -> Iterator[tuple[str, Act]]:
    for name in PRETRAINED:
        yield _job(f"{name}.yaml", pretrain, DEBUG)
    for name in EXTRACTED:
        yield _job(f"{name}.yaml", extract, DEBUG)
    for name in ("digits/spatial", "digits/pooled", "own/inverter"):
        yield _job(f"{name}.yaml", train_and_test, DEBUG)
    for name in ("extract", "judge-shards", "clean", "corrupted", "adversarial-1", "adversarial-2", "adversarial-4"):
        yield _job(f"cifar10/{name}.yaml", extract, DEBUG)
    yield _job("cifar10/prior.yaml", pretrain, DEBUG)
    for name in ("inverter", "pooled"):
        yield _job(f"cifar10/{name}.yaml", train_and_test, DEBUG)
    yield _job("study/digits/authors.yaml", train_and_test, DEBUG, root="runs/authors")
    for name in ("extract", "clean", "corrupted", "adversarial", "shapes", "few"):
        yield _job(f"photos/{name}.yaml", extract, DEBUG)
    yield _job("photos/prior.yaml", pretrain, DEBUG)
    for name in ("inverter", "pooled"):
        yield _job(f"photos/{name}.yaml", train_and_test, DEBUG)


def _imagenet() -> Iterator[tuple[str, Act]]:
    for name in NETWORKS:
        for source in EXTRACTIONS:
            over = f"parts/{'corrupt' if source == '-corrupted' else 'extract'}-{name}.yaml"
            yield _job(f"imagenet/extract/{name}{source}.yaml", extract, over)
        for training in ("spatial", "pooled", "spatial-authors", "pooled-authors"):
            yield _job(f"imagenet/train/{name}-{training}.yaml", train, f"parts/train-{name}.yaml")
        yield _job(f"imagenet/test/{name}.yaml", test, "parts/test.yaml", root=f"runs/imagenet/{name}/spatial")
    yield _job("imagenet/test/robustness.yaml", test, "parts/test.yaml", root="runs/imagenet/resnet50/spatial")
    beneath = ("imagenet/train/resnet50-spatial.yaml", "parts/train-resnet50.yaml")
    for name in ("12gb", "24gb", "80gb"):
        file = f"imagenet/memory/{name}.yaml"
        yield file, partial(train, *beneath, file, f"parts/{name}.yaml", root=f"runs/imagenet/{name}")
    for name in ("several", "slow-links"):
        yield f"imagenet/gpus/{name}.yaml", partial(train, *beneath, f"imagenet/gpus/{name}.yaml", root=f"runs/{name}")


def _sweeps() -> Iterator[tuple[str, Act]]:
    for name, overlay in (("backbones", "resnet50"), ("encoder", "convnext"), ("guidance", "convnext")):
        yield _job(f"sweeps/{name}.yaml", sweep, f"parts/train-{overlay}.yaml")  # of the first run
    for name, plan in (("digits", "encoder"), ("digits-guidance", "guidance")):
        yield f"sweeps/{name}.yaml", partial(sweep, f"sweeps/{plan}.yaml", f"parts/sweep-{name}.yaml")


def _benchmarks() -> Iterator[tuple[str, Act]]:
    chain: list[str] = []
    for name in (*SAVINGS, *AGAIN, *ON_GPU):
        chain += [f"bench/{name}.yaml"]
        yield f"bench/{name}.yaml", partial(benchmark, *chain, "parts/bench.yaml")
    beneath = ("imagenet/train/resnet50-spatial.yaml", "parts/train-resnet50.yaml")
    yield "bench/gpu.yaml", partial(benchmark, *beneath, "bench/gpu.yaml", "parts/bench.yaml")
    yield "bench/profile.yaml", partial(benchmark, "digits/spatial.yaml", "bench/profile.yaml", DEBUG)


def _studies() -> Iterator[tuple[str, Act]]:
    yield _job("study/digits.yaml", study, "study")
    for name in ("cifar10", "choices", "photos", "layers", "layers-photos"):
        yield _job(f"study/{name}.yaml", study, f"study-{name}")


def _job(file: str, act: Callable[..., str], *over: str, **options: str) -> tuple[str, Act]:
    return file, partial(act, file, *over, **options)
