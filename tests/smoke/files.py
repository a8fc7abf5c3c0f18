"""How each YAML under `experiments/` is run. One that is not named here fails a test."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import yaml

from bench.training import AGAIN, ON_GPU, SAVINGS
from smoke.acts import benchmark, extract, pretrain, study, test, train, train_and_test
from smoke.parts import NETWORKS
from smoke.sweeps import trial

SHIPPED = Path(__file__).parents[2] / "experiments"
DEBUG = "debug.yaml"
EXTRACTIONS = ("-train", "-train-authors", "", "-robustness", "-imagenet-c", "-corrupted", "-adversarial")
TAKEN_ALONG = {
    "debug.yaml": "over all files of digits/, cifar10/ and study/; make demo SHORT=1",
    "sweeps/run.yaml": "in the command of every sweep",
}


class Job(NamedTuple):
    """What runs a file: `act` returns what that was, and raises an error if anything is wrong."""

    kind: str
    act: Callable[[], str]


def jobs() -> dict[str, Job]:
    """By file, in an order in which each finds what it reads."""
    return dict([*_small_images(), *_imagenet(), *_sweeps(), *_benchmarks(), *_studies()])


def bases() -> dict[str, int]:
    """Files that lie beneath others by `base:`, and of how many jobs."""
    counts: dict[str, int] = {}
    for name in jobs():
        for base in set(_beneath(SHIPPED / name)):
            key = base.relative_to(SHIPPED.resolve()).as_posix()
            counts[key] = counts.get(key, 0) + 1
    return counts


def _beneath(path: Path) -> Iterator[Path]:
    given = yaml.safe_load(path.read_text()).get("base", [])
    for name in given if isinstance(given, list) else [given]:
        base = (path.parent / name).resolve()
        yield base
        yield from _beneath(base)


def _small_images() -> Iterator[tuple[str, Job]]:
    for name in ("digits/classifier", "digits/autoencoder", "digits/prior", "study/digits/prior", "study/digits/judge"):
        yield _job("pretraining", f"{name}.yaml", pretrain, DEBUG)
    for name in ("digits/extract", "digits/adversarial", "study/digits/judge-shards"):
        yield _job("extraction", f"{name}.yaml", extract, DEBUG)
    for name in ("digits/spatial", "digits/pooled"):
        yield _job("training", f"{name}.yaml", train_and_test, DEBUG)
    yield _job("training", "study/digits/authors.yaml", train_and_test, DEBUG, root="runs/authors")
    for name in ("classifier", "judge", "autoencoder", "prior"):
        yield _job("pretraining", f"cifar10/{name}.yaml", pretrain, DEBUG)
    yield _job("extraction", "cifar10/extract.yaml", extract, DEBUG)
    yield _job("training", "cifar10/authors.yaml", train_and_test, DEBUG)


def _imagenet() -> Iterator[tuple[str, Job]]:
    for name in NETWORKS:
        for source in EXTRACTIONS:
            over = f"parts/{'corrupt' if source == '-corrupted' else 'extract'}-{name}.yaml"
            yield _job("extraction", f"imagenet/extract/{name}{source}.yaml", extract, over)
        for training in ("spatial", "pooled", "spatial-authors", "pooled-authors"):
            yield _job("training", f"imagenet/train/{name}-{training}.yaml", train, f"parts/train-{name}.yaml")
        yield _job("test", f"imagenet/test/{name}.yaml", test, "parts/test.yaml", root=f"runs/imagenet/{name}/spatial")
    yield _job("test", "imagenet/test/robustness.yaml", test, "parts/test.yaml", root="runs/imagenet/resnet50/spatial")
    for name in ("12gb", "24gb", "80gb"):
        file = f"imagenet/memory/{name}.yaml"
        beneath = ("imagenet/train/resnet50-spatial.yaml", "parts/train-resnet50.yaml")
        files = (*beneath, file, f"parts/{name}.yaml")
        yield file, Job("memory", partial(train, *files, root=f"runs/imagenet/{name}"))


def _sweeps() -> Iterator[tuple[str, Job]]:
    for name in ("backbones", "encoder", "guidance"):
        overlay = "resnet50" if name == "backbones" else "convnext"  # of the first run
        yield _job("sweep", f"sweeps/{name}.yaml", trial, f"parts/train-{overlay}.yaml")
    for name, sweep in (("digits", "encoder"), ("digits-guidance", "guidance")):
        act = partial(trial, f"sweeps/{sweep}.yaml", f"parts/sweep-{name}.yaml")
        yield f"sweeps/{name}.yaml", Job("sweep", act)


def _benchmarks() -> Iterator[tuple[str, Job]]:
    chain: list[str] = []
    for name in (*SAVINGS, *AGAIN, *ON_GPU):
        chain += [f"bench/{name}.yaml"]
        yield f"bench/{name}.yaml", Job("benchmark", partial(benchmark, *chain, "parts/bench.yaml"))
    profiled = ("digits/spatial.yaml", "bench/profile.yaml", DEBUG)
    yield "bench/profile.yaml", Job("benchmark", partial(benchmark, *profiled))


def _studies() -> Iterator[tuple[str, Job]]:
    for name, target in (("digits", "study"), ("cifar10", "study-cifar10")):
        yield _job("study", f"study/{name}.yaml", study, target)


def _job(kind: str, file: str, act: Callable[..., str], *over: str, **options: str) -> tuple[str, Job]:
    return file, Job(kind, partial(act, file, *over, **options))
