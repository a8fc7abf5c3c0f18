"""Hostile and broken input: what the public command makes of files that are not as they should be.

Each trial spoils one input, runs one command on it within this process, and looks at what came of it: how it ended,
what it said, how long it took, how much memory, and which files are there afterwards.
"""

import contextlib
import hashlib
import io
import json
import random
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import parity
from conftest import copy_of
from featinv_pl.__main__ import main
from tiny import extract_digits, make_classifier, make_inverter, make_prior
from torture.hostile_files import (
    ANY,
    CHECKPOINTS,
    CONCEPTS,
    JSONS,
    LEAVES,
    MODELS,
    PICTURES,
    REPORTS,
    SHARDS,
    TENSORS,
    YAMLS,
    Spoil,
    concepts_with,
    content,
    paths,
    put,
    signed,
    within,
)
from torture.table import Figure

ROOT = Path(__file__).parents[2]
SECONDS, MEGABYTES = 20, 1024  # more is a hang, or a hunger; a hostile file is small
IN, OUT = "in", "out"
OUTCOMES = (
    "refused", "harmless", "accepted", "undetected", "unclear", "traceback", "ran code", "wrote outside", "too slow",
    "too much memory",
)  # fmt: skip
WRONG = OUTCOMES[3:]
DETERMINISTIC: dict[str, Any] = {
    "derandomize": True,
    "database": None,
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
}


@dataclass(frozen=True)
class Kind:
    """A kind of input.

    Attributes:
        name: For the table.
        original: The folder of its valid input.
        command: What reads it, from a folder that holds it as `in/`.
        files: What random damage hits, by patterns below `in/`.
        spoils: Ways to spoil it on purpose.
        sealed: No random change may pass for a valid input.
        values: Which JSON and YAML files have values that are replaced by others.
        results: What the command may write besides `out/`.
    """

    name: str
    original: str
    command: tuple[str, ...]
    files: tuple[str, ...]
    spoils: dict[str, Spoil]
    sealed: bool = False
    values: tuple[str, ...] = ()
    results: str = r"out(/.*)?"


@dataclass
class Trial:
    """What came of one."""

    outcome: str
    seconds: float
    megabytes: int
    said: str


class HangError(BaseException):
    """Not an Exception, so that nothing takes it for an error of its own."""


# What is spoilt


def make_originals(root: Path) -> None:
    """Write one valid input of every kind below `root/originals`, and what else the commands need to `root/parts`."""
    parts, originals = root / "parts", root / "originals"
    for folder in (parts, originals):
        folder.mkdir()
    make_classifier(parts)
    make_prior(parts)
    make_inverter(parts / "model", parts / "classifier", parts / "prior")
    shards = extract_digits(parts, parts / "classifier", parts / "prior")
    copy_of("4", parts)
    _make_run(parts, shards)
    state = parity.state_dict()
    parity.write_backbone(parts / "their-backbone")
    parity.write_prior(parts / "their-prior", state)
    inputs: dict[str, Callable[[Path], Any]] = {
        "configuration": lambda folder: shutil.copy(parts / "run/fit.yaml", folder / "configuration.yaml"),
        "plan": lambda folder: (folder / "plan.yaml").write_text(yaml.safe_dump(PLAN)),
        "shards": lambda folder: shutil.copytree(shards / "clean", folder / "clean"),
        "checkpoint": lambda folder: shutil.copytree(parts / "run", folder / "run"),
        "model": lambda folder: shutil.copytree(parts / "model", folder / "model"),
        "prior": lambda folder: shutil.copytree(parts / "their-prior", folder / "prior"),
        "authors": lambda folder: torch.save({"state_dict": state, "global_step": 3}, folder / "authors.ckpt"),
        "authors-tensors": lambda folder: save_file(state, folder / "authors.safetensors"),
        "concepts": lambda folder: main(
            ["concepts", str(shards / "clean"), str(shards / "train"), "--method=difference", "--out", str(folder)]
        ),
        "picture": lambda folder: copy_of("4", folder).rename(folder / "picture.png"),
        "scores": lambda folder: shutil.copytree(parts / "scored", folder / "runs"),
    }
    for name, make in inputs.items():
        (originals / name).mkdir()
        make(originals / name)


PLAN: dict[str, Any] = {
    "folder": "out/study",
    "needs": ["nowhere"],  # where each valid plan ends, before it runs anything
    "prepare": [{"command": "predict --config nowhere.yaml", "makes": "out/shards"}],
    "config": "nowhere.yaml",
    "source": "val",
    "seeds": [0, 1],
    "runs": {"spatial": {}, "pooled": {"set": {"model": {"init_args": {"conditioning": "pooled"}}}}},
}


def _make_run(parts: Path, shards: Path) -> None:
    """A run of `fit`, and what its test has left."""
    saver = {"dirpath": str(parts / "run/checkpoints"), "filename": "inversion"}
    settings: dict[str, Any] = {
        "seed_everything": 0,
        "trainer": {
            "accelerator": "cpu",
            "logger": False,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "num_sanity_val_steps": 0,
            "default_root_dir": str(parts / "run"),
            "max_steps": 1,
            "val_check_interval": 1,
            "callbacks": [
                {"class_path": "ModelCheckpoint", "init_args": saver},
                {"class_path": "Evaluation", "init_args": {"num_images": 3}},
            ],
        },
        "model": {
            "class_path": "FeatureInversion",
            "init_args": {
                "backbone": str(parts / "classifier"),
                "prior": str(parts / "prior"),
                "image_size": 32,
                "encoder": {"hidden_channels": 8},
                "sampler": {"steps": 2},
            },
        },
        "data": {
            "class_path": "FeatureShards",
            "init_args": {"train": str(shards / "train"), "test": {"clean": str(shards / "clean")}, "batch_size": 16},
        },
    }
    (parts / "fit.yaml").write_text(yaml.safe_dump(settings))
    main(["fit", "--config", str(parts / "fit.yaml")])
    home = f"--trainer.default_root_dir={parts / 'scored/spatial'}"
    main(["test", "--config", str(parts / "fit.yaml"), "--ckpt_path", str(parts / "run/checkpoints"), home])


def kinds(root: Path) -> list[Kind]:
    """All kinds of input, for originals below `root`."""
    parts = root / "parts"
    model, digit = str(parts / "model"), str(parts / "digit-4.png")
    theirs = ("--model.backbone", str(parts / "their-backbone"))
    official = (*theirs, "--model.prior", str(parts / "their-prior"))
    any_file = {spoil.__name__: spoil for spoil in ANY}
    weights = {name: spoil for name, spoil in any_file.items() if name != "huge_and_sparse"}
    configurations = {f"its configuration: {name}": spoil for name, spoil in {**any_file, **YAMLS}.items()}
    return [
        Kind(
            "configuration",
            "configuration",
            ("fit", "--config", "in/configuration.yaml", "--print_config"),
            ("configuration.yaml",),
            _on("configuration.yaml", {**any_file, **YAMLS, **CONFIGURATIONS}),
            values=("configuration.yaml",),
        ),
        Kind(
            "plan of a study",
            "plan",
            ("study", "in/plan.yaml"),
            ("plan.yaml",),
            _on("plan.yaml", {**any_file, **YAMLS, **PLANS}),
            values=("plan.yaml",),
        ),
        Kind(
            "shards, verified",
            "shards",
            ("verify", "in/clean"),
            ("clean/*.tar", "clean/*.json"),
            {
                **_on("clean", SHARDS),
                **_on("clean/manifest.json", {**any_file, **JSONS}),
                **_on("clean/clean-00000.json", any_file),
                **_on("clean/clean-00000.tar", weights),
            },
            sealed=True,
        ),
        Kind(
            "shards, read",
            "shards",
            ("concepts", "in/clean", "--method=difference", "--between", "3", "8", "--out", "out"),
            ("clean/*.tar", "clean/*.json"),
            {**_on("clean", SHARDS), **_on("clean/manifest.json", JSONS), **_on("clean/clean-00000.tar", weights)},
            sealed=True,
        ),
        Kind(
            "checkpoint",
            "checkpoint",
            ("export", "in/run", "out/model"),
            ("run/checkpoints/inversion.ckpt",),
            {
                **_on("run/checkpoints/inversion.ckpt", {**weights, **CHECKPOINTS}),
                **_on("run/fit.yaml", configurations),
            },
            sealed=True,
        ),
        Kind(
            "model folder",
            "model",
            ("reconstruct", "--model", "in/model", digit, "--num_samples=1", "--out", "out"),
            ("model/**/*.json", "model/**/*.safetensors", "model/SHA256SUMS"),
            {**_on("model", MODELS), **_on("model/model_index.json", any_file), **_on("model/SHA256SUMS", any_file)},
            sealed=True,
            values=("model/model_index.json", "model/prior/unet/config.json", "model/backbone/config.json"),
        ),
        Kind(
            "prior",
            "prior",
            ("import", str(root / "originals/authors-tensors/authors.safetensors"), "out/model", *theirs,
             "--model.prior", "in/prior"),
            ("prior/**/*.json", "prior/**/*.safetensors"),
            {
                **_on("prior/unet/config.json", any_file),
                **_on("prior/scheduler/scheduler_config.json", any_file),
                **_on("prior/vae/diffusion_pytorch_model.safetensors", {**weights, **TENSORS}),
                **_on("prior/prompts.safetensors", weights),
            },
        ),
        Kind(
            "authors' checkpoint",
            "authors",
            ("import", "in/authors.ckpt", "out/model", *official),
            ("authors.ckpt",),
            _on("authors.ckpt", {**weights, **CHECKPOINTS}),
            sealed=True,
        ),
        Kind(
            "authors' weights",
            "authors-tensors",
            ("import", "in/authors.safetensors", "out/model", *official),
            ("authors.safetensors",),
            _on("authors.safetensors", {**weights, **TENSORS}),
        ),
        Kind(
            "concepts",
            "concepts",
            ("steer", "--model", model, digit, "--concepts", "in", "--strengths=0,1", "--out", "out"),
            ("concepts.*",),
            {**_on(".", CONCEPTS), **_on("concepts.json", any_file), **_on("concepts.safetensors", any_file)},
            sealed=True,
            values=("concepts.json",),
        ),
        Kind(
            "picture",
            "picture",
            ("compare", "in/picture.png", "--models", model, "--out", "out"),
            ("picture.png",),
            _on("picture.png", {**any_file, **{name: content(data) for name, data in PICTURES.items()}}),
        ),
        Kind(
            "scores of a run",
            "scores",
            ("report", "in/runs"),
            ("runs/spatial/metrics.json", "runs/spatial/pictures/clean/first/*", "runs/spatial/samples/*"),
            _on("runs", REPORTS),
            values=("runs/spatial/metrics.json", "runs/spatial/pictures/clean/first/tiles.json"),
            results=r"in/runs/(report\.html|metrics\.json|overview\.png)(\.partial)?|in/runs",
        ),
    ]  # fmt: skip


def _appended(lines: str) -> Spoil:
    return lambda path: content((path.read_text() + lines).encode())(path)


def _planned(changes: dict[str, Any]) -> Spoil:
    return content(yaml.safe_dump({**PLAN, **changes}).encode())


CONFIGURATIONS: dict[str, Spoil] = {
    name: _appended(lines)
    for name, lines in {
        "on itself": "base: configuration.yaml\n",
        "on a folder": "base: .\n",
        "on endless zeros": "base: /dev/zero\n",
        "on a number": "base: 7\n",
        "on nothing": "base: nowhere.yaml\n",
        "on a list of lists": "base: [[a]]\n",
        "a class of a command": "trainer+: {class_path: os.system}\n",
        "a checkpoint of a device": "ckpt_path: /dev/zero\n",
        "appended to nothing": "trainer: {callbacks+: 7}\n",
    }.items()
}
PLANS: dict[str, Spoil] = {
    name: _planned(changes)
    for name, changes in dict[str, dict[str, Any]](
        {
            "run of a path": {"runs": {"../../outside": {}}, "needs": []},
            "run of an absolute path": {"runs": {"/tmp/featinv-outside": {}}, "needs": []},
            "run of two dots": {"runs": {"..": {}}, "needs": []},
            "run of a null byte": {"runs": {"a\0b": {}}, "needs": []},
            "run of two lines": {"runs": {"a\nb": {}}, "needs": []},
            "run without a name": {"runs": {"": {}}, "needs": []},
            "run that adapts itself": {"runs": {"a": {"adapts": "a"}}},
            "command of a shell": {"prepare": [{"command": "predict; touch ../ran", "makes": "x"}], "needs": []},
            "command of nothing": {"prepare": [{"command": "", "makes": "x"}], "needs": []},
            "command of half a quotation": {"prepare": [{"command": "predict '", "makes": "x"}], "needs": []},
            "folder of a null byte": {"folder": "a\0b"},
            "seed of 10^400": {"seeds": [10**400]},
            "needs all files": {"needs": ["/proc/self/mem"]},
        }
    ).items()
}


def _on(name: str, spoils: dict[str, Spoil]) -> dict[str, Spoil]:
    """Ways to spoil a file of an input."""
    return {f"{name}: {what}": within(name, spoil) for what, spoil in spoils.items()}


# Trials


@dataclass
class Bench:
    """Where trials take place.

    Attributes:
        root: Holds what `make_originals` has written.
    """

    root: Path
    before: dict[str, tuple[int | str | None, str]] = field(default_factory=dict)

    def trial(self, kind: Kind, spoil: Spoil, authored: bool) -> Trial:
        """Spoil an input, run the command that reads it, and judge what came of it.

        Args:
            kind: Of input.
            spoil: Changes `in/`.
            authored: Whether somebody has made the change, checksums and all.
        """
        yard = self.root / "yard"
        place = yard / "place"
        shutil.rmtree(yard, ignore_errors=True)
        shutil.copytree(self.root / "originals" / kind.original, place / IN)
        (yard / "outside").write_text("precious")
        (place / OUT).mkdir()
        with contextlib.chdir(place):
            try:
                spoil(place / IN)
            except FileNotFoundError:  # a second change to what the first took away
                return Trial("harmless", 0.0, 0, "")
            watched = _listing(yard)
            ended, said, seconds, megabytes = _run(list(kind.command))
            changed = {name for name, _ in watched.items() ^ _listing(yard).items()}
        result = _contents(place / OUT) + said[0] + _message(said)
        outcome = self._judge(kind, ended, result, said, authored)
        if seconds > SECONDS:
            outcome = "too slow"
        if megabytes > MEGABYTES or "allocate" in said[1]:
            outcome = "too much memory"
        if elsewhere := [name for name in changed if not re.fullmatch(f"place/({kind.results}|out(/.*)?)|place", name)]:
            outcome, said = "wrote outside", (said[0], f"{elsewhere}\n{said[1]}")
        if (yard / "ran").exists():
            outcome = "ran code"
        shutil.rmtree(yard)
        return Trial(outcome, seconds, megabytes, said[1])

    def _judge(self, kind: Kind, ended: int | str | None, result: str, said: tuple[str, str], authored: bool) -> str:
        if ended == "hang":
            return "too slow"
        if isinstance(ended, str):
            return "traceback"
        if ended == 1 and not _is_clear(kind, said):
            return "unclear"
        if (ended, result) == self.unspoilt(kind):
            return "harmless"
        if ended:
            return "refused"
        return "undetected" if kind.sealed and not authored else "accepted"

    def unspoilt(self, kind: Kind) -> tuple[int | str | None, str]:
        """How the command ends, and its result, with the input as it was."""
        if kind.name not in self.before:
            self.before[kind.name] = (None, "")
            place = self.root / "unspoilt" / "place"
            shutil.rmtree(place.parent, ignore_errors=True)
            shutil.copytree(self.root / "originals" / kind.original, place / IN)
            (place / OUT).mkdir()
            with contextlib.chdir(place):
                ended, said, _, _ = _run(list(kind.command))
            self.before[kind.name] = (ended, _contents(place / OUT) + said[0] + _message(said))
        return self.before[kind.name]


def _run(command: list[str]) -> tuple[int | str | None, tuple[str, str], float, int]:
    """Run the public command: exit status or what it raised, what it said, seconds, and megabytes more than before."""
    out, err = io.StringIO(), io.StringIO()
    begun, held = time.monotonic(), _memory(reset=True)
    ended: int | str | None = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _limits():
            main(command)
    except SystemExit as stop:
        ended = stop.code
    except HangError:
        ended = "hang"
    except MemoryError:
        ended = "memory"
        err.write("cannot allocate")
    except Exception:
        ended = "traceback"
        err.write(traceback.format_exc())
    return ended, (out.getvalue(), err.getvalue()), time.monotonic() - begun, _memory() - held


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    """Raise where something hangs or takes more memory than any of these inputs needs."""

    def stop(*_: object) -> None:
        raise HangError

    virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (virtual + (2 * MEGABYTES << 20), limits[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def _memory(reset: bool = False) -> int:
    """The largest resident size of this process in MB, since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) >> 10


def _message(said: tuple[str, str]) -> str:
    return "".join(line for line in said[1].splitlines() if line.startswith("featinv-pl: error: "))


def _is_clear(kind: Kind, said: tuple[str, str]) -> bool:
    """Whether a refusal is one message that names what is wrong."""
    if kind.command[0] == "verify" and re.search(r"^in/clean: damaged$|^in/clean: damaged:", said[0], re.MULTILINE):
        return True
    lines = said[1].strip().splitlines() or [""]
    messages = [line for line in lines if line.startswith("featinv-pl: error: ")]
    named = re.search(
        rf"\b{IN}/|base: .*'/|--concepts belongs to|not trusted: |'{IN}'|--model\.sampler\.", lines[-1]
    )  # only one file says how a model draws
    return messages == lines[-1:] and len(lines[-1]) < 1500 and named is not None


def _listing(folder: Path) -> dict[str, tuple[int, int, int]]:
    """What lies below a folder, so that a change shows: kind and rights, size, time."""
    found = {}
    for path in folder.rglob("*"):
        stat = path.lstat()
        is_folder = path.is_dir() and not path.is_symlink()
        found[path.relative_to(folder).as_posix()] = (
            stat.st_mode,
            0 if is_folder else stat.st_size,
            0 if is_folder else stat.st_mtime_ns,
        )
    return found


def _contents(folder: Path) -> str:
    """A digest of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return "".join(f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n" for path in files)


# Random damage


@st.composite
def edits(draw: st.DrawFn, size: int) -> list[tuple[str, int, int]]:
    """A few changes to a file of some size: what, where, and how much."""
    one = st.tuples(
        st.sampled_from(("flip", "flip", "cut", "zero", "remove", "insert", "repeat", "overwrite")),
        st.integers(0, max(size - 1, 0)),
        st.integers(1, 600),
    )
    return draw(st.lists(one, min_size=1, max_size=3))


def edited(data: bytes, changes: list[tuple[str, int, int]]) -> bytes:
    """A file after changes to its bytes."""
    for what, place, amount in changes:
        here = min(place, len(data))
        head, middle, tail = data[:here], data[here : here + amount], data[here + amount :]
        rng = random.Random(place * 601 + amount)
        if what == "flip" and middle:
            middle = bytes([middle[0] ^ 1 << amount % 8]) + middle[1:]
        elif what == "cut":
            middle = tail = b""
        elif what == "zero":
            middle = bytes(len(middle))
        elif what == "remove":
            middle = b""
        elif what == "insert":
            middle = rng.randbytes(amount) + middle
        elif what == "repeat":
            middle *= 2
        elif what == "overwrite":
            middle = rng.randbytes(len(middle))
        data = head + middle + tail
    return data


def damaged(bench: Bench, kind: Kind, number: int, judge: Callable[[str, Trial], None]) -> None:
    """Damage files of an input at random places, so many times, and hand each trial to a judge."""
    source = bench.root / "originals" / kind.original
    files = sorted({path.relative_to(source) for pattern in kind.files for path in source.glob(pattern)})
    assert files

    @settings(max_examples=number, **DETERMINISTIC)
    @given(st.data())
    def try_one(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(files))
        original = (source / name).read_bytes()
        changes = data.draw(edits(len(original)))
        changed = edited(original, changes)
        if changed != original:
            trial = bench.trial(kind, lambda folder: content(changed)(folder / name), authored=False)
            judge(f"{name} after {changes}", trial)

    try_one()


def revalued(bench: Bench, kind: Kind, number: int, judge: Callable[[str, Trial], None]) -> None:
    """Replace values within the JSON and YAML files of an input by others, as their author might."""
    source = bench.root / "originals" / kind.original

    @settings(max_examples=number, **DETERMINISTIC)
    @given(st.data())
    def try_one(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(kind.values))
        contents = _values(source / name)
        where = data.draw(st.sampled_from(list(paths(contents))))
        value = data.draw(st.sampled_from(LEAVES))
        trial = bench.trial(kind, lambda folder: _revalue(folder / name, where, value), authored=True)
        judge(f"{name}: {where} = {value!r}"[:200], trial)

    try_one()


def _values(path: Path) -> Any:
    return json.loads(path.read_text()) if path.suffix == ".json" else yaml.safe_load(path.read_text())


def _revalue(path: Path, where: tuple[Any, ...], value: Any) -> None:
    contents = _values(path)
    put(contents, where, value)
    try:
        path.write_text(json.dumps(contents) if path.suffix == ".json" else yaml.safe_dump(contents))
    except ValueError:  # such as numbers of 400 digits
        path.write_text("")
    for folder in path.parents:
        if (folder / "SHA256SUMS").is_file():
            signed(folder)
    if path.name == "concepts.json" and path.stat().st_size:
        concepts_with(lambda _: None)(path.parent)


def damage_files(root: Path, mutations: int) -> Iterator[Figure]:
    """Spoil every kind of input on purpose, and at random so many times each.

    Args:
        root: An empty folder.
        mutations: Random changes of bytes, and as many of values, for each kind of input.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        make_originals(root)
    bench = Bench(root)
    for kind in kinds(root):
        trials: list[Trial] = []

        def judge(what: str, trial: Trial, kind: Kind = kind, trials: list[Trial] = trials) -> None:
            trials.append(trial)
            if trial.outcome in WRONG:
                print(f"{kind.name}: {what}: {trial.outcome}: {trial.said[-600:]}", file=sys.stderr)

        for what, spoil in kind.spoils.items():
            judge(what, bench.trial(kind, spoil, authored=True))
        damaged(bench, kind, mutations, judge)
        if kind.values:
            revalued(bench, kind, mutations, judge)
        yield figure(kind.name, trials)


def figure(name: str, trials: list[Trial]) -> Figure:
    """A line of the table for a kind of input.

    Beside the wrong ways to end: `refused` with one message or the command's usage; `harmless`, with the result that
    the input gives unspoilt; `accepted`, with another result of another valid input, which a hostile author may write
    and a format without checksums cannot tell.
    """
    counts = Counter(trial.outcome for trial in trials)
    unnoticed = counts["undetected"]
    wrong = sum(counts[outcome] for outcome in WRONG) - unnoticed
    ended = ", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES if counts[outcome])
    slowest, hungriest = max(trial.seconds for trial in trials), max(trial.megabytes for trial in trials)
    note = f"{ended}; at most {slowest:.1f} s and {hungriest} MB"
    return Figure(name, "files spoilt", len(trials), wrong, unnoticed, note)
