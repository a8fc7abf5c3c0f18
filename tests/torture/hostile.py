"""Hostile and damaged input: what the public command makes of files that are not as they should be.

Each trial spoils one input, runs the command that reads it within this process, and checks what came of it.
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
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

import parity
from conftest import copy_of
from featinv_pl.__main__ import main
from featinv_pl.data.shards import reader
from featinv_pl.data.shards.manifest import MANIFEST, index_path, to_json
from featinv_pl.explore.concepts import FACTS, seal
from featinv_pl.explore.concepts import TENSORS as DIRECTIONS
from featinv_pl.nets.hub import INDEX, SUMS, write_sums
from tiny import TRAINER, extract_digits, inversion, make_classifier, make_inverter, make_prior, write
from torture import spoils
from torture.spoils import ANY, JSONS, Spoil, Spoils, holds, links_to, puts
from torture.table import Figure

DIFFERENCE = ("--method=difference",)
SECONDS, MEGABYTES = 120, 1536  # more is a hang, or a hunger; a hostile file is small
UNET, SCHEDULER = "diffusion_pytorch_model.safetensors", "prior/scheduler/scheduler_config.json"
NAMED = r"in/|'in'|--concepts belongs to"
UNREADABLE = r"damaged|no file|not a|is no |No such|Is a directory|cannot be read|empty"
TAMPERED = r"files of 'in/model' are not as SHA256SUMS in it says|" + UNREADABLE
OTHER_WEIGHTS = r"could not be loaded|are missing|not finite|damaged|lacks \d+ weights"


@dataclass(frozen=True, eq=False)
class Kind:
    """A kind of input.

    Attributes:
        name: For the table.
        command: What reads it, from a folder that holds it as `in/`.
        cases: File or pattern of files, ways to spoil the first, and the sentence that each must be refused with; None
            where another valid input may come of it.
        reseal: Makes the input's checksums agree with what its author has spoilt.
        checked: Whether every random change of bytes must show.
    """

    name: str
    command: tuple[str, ...]
    cases: tuple[tuple[str, Spoils, str | None], ...]
    reseal: Callable[[Path], object] = lambda folder: None
    checked: bool = True


def kinds(parts: Path) -> list[Kind]:
    """All kinds, for what `make_originals` has written to `parts`."""
    model, digit = str(parts / "model"), str(parts / "digit-4.png")
    shard = (
        (MANIFEST, {**ANY, **JSONS}, rf"in/.*({UNREADABLE})|manifest"),
        (MANIFEST, SETS, NAMED),
        ("*-00000.json", {**ANY, **JSONS, **ENTRIES}, NAMED),
        ("*.tar", {**ANY, **spoils.MEMBERS}, NAMED),
    )
    torch_file = {**ANY, **spoils.ARCHIVES, **spoils.CONTENTS, **spoils.RUN_CODE}
    unsigned = {name: one for name, one in ANY.items() if name not in ("missing", "link to itself")}
    folder = {**{f"pickle of {one}": pickled(one) for one in ("prior/unet", "backbone")}, "weights outside": outside}
    return [
        Kind(
            "configuration",
            ("fit", "--config", "in/fit.yaml", "--print_config"),
            (("fit.yaml", CONFIGURATIONS, r"in/fit\.yaml|not trusted|base: "), ("fit.yaml", ANY, None)),
            checked=False,
        ),
        Kind("shards", ("verify", "in"), shard, resealed),
        Kind("shards read", ("concepts", "in", *DIFFERENCE, "--between", "3", "8", "--out", "out"), shard, resealed),
        Kind(
            "checkpoint",
            ("export", "in", "out/model"),
            (
                ("checkpoints/inversion.ckpt", torch_file, r"inversion.ckpt' is damaged|no file '|'in' holds no"),
                ("checkpoints/inversion.ckpt", spoils.WEIGHTS, OTHER_WEIGHTS),
            ),
        ),
        Kind(
            "model folder",
            ("reconstruct", "--model", "in/model", digit, "--num_samples=1", "--out", "out"),
            (
                (f"model/{INDEX}", {**ANY, **JSONS}, TAMPERED + "|lacks|does not say"),
                (f"model/{SUMS}", unsigned, TAMPERED),
                (f"model/{INDEX}", INDICES, r"'in/model|in/model/"),
                (f"model/{INDEX}", values(("prior", "$(touch ../ran)")), None),
                ("model/prior/unet/config.json", {**ANY, **JSONS}, rf"{UNREADABLE}|no file|{OTHER_WEIGHTS}"),
                ("model/prior/unet/config.json", UNETS, r"in/model/prior"),
                ("model/backbone/config.json", CLASSIFIERS, r"in/model/backbone"),
                (f"model/{SCHEDULER}", SCHEDULES, rf"in/model/{SCHEDULER}' does not describe a schedule"),
                (f"model/prior/unet/{UNET}", {**spoils.HEADERS, **spoils.TENSORS}, OTHER_WEIGHTS),
                (f"model/controlnet/{UNET}", {**spoils.HEADERS, **spoils.TENSORS}, OTHER_WEIGHTS),
                ("model/backbone/model.safetensors", {**spoils.HEADERS, **spoils.TENSORS}, r"in/model"),
                ("model/prior/prompts.safetensors", spoils.HEADERS, r"prompts.safetensors' is damaged"),
                ("model", folder, r"could not be loaded|not in its folder"),
            ),
            lambda folder: signed(folder / "model"),
        ),
        Kind(
            "authors' checkpoint",
            (*("import", "in/authors.ckpt", "out/model", "--model.backbone", str(parts / "their-backbone")),
             *("--model.prior", str(parts / "their-prior"))),
            (
                ("authors.ckpt", {**ANY, "zip bomb": spoils.zip_bomb}, "in/authors.ckpt' is damaged|no file '"),
                ("authors.ckpt", spoils.RUN_CODE, "would call posix.system when loaded"),
                ("authors.ckpt", spoils.CONTENTS, "holds no tensors"),
                ("authors.ckpt", spoils.WEIGHTS, OTHER_WEIGHTS),
            ),
        ),
        Kind(
            "concepts",
            ("steer", "--model", model, digit, "--concepts", "in", "--strengths=0,1", "--out", "out"),
            (
                (FACTS, {**ANY, **JSONS}, NAMED),
                (FACTS, DESCRIPTIONS, r"in/|'in'|--concepts"),
                (FACTS, values(("names", 0, "../../outside")), None),
                (DIRECTIONS, {**ANY, **spoils.HEADERS, **spoils.TENSORS}, NAMED),
            ),
            described,
        ),
        Kind(
            "picture",
            ("compare", "in/picture.png", "--models", model, "--out", "out"),
            (("picture.png", {**ANY, **spoils.PICTURES}, r"in/picture.png"),),
            checked=False,
        ),
        Kind(
            "scores of a run",
            ("report", "in"),
            (
                ("spatial/metrics.json", {**ANY, **JSONS, **SCORES}, r"in/spatial/metrics.json|'in'"),
                ("spatial/pictures/*/first/tiles.json", {**ANY, **JSONS}, None),
                ("spatial/pictures/*/first/original.png", {**ANY, **spoils.PICTURES}, None),
                ("spatial", {"report is a link": report_is_a_link}, None),
            ),
            checked=False,
        ),
    ]  # fmt: skip


def make_originals(root: Path) -> Path:
    """Write a valid input of every kind below `root/originals`, and the parts that commands need; return the parts."""
    parts, originals = root / "parts", root / "originals"
    for folder in (parts, originals):
        folder.mkdir(parents=True)
    classifier, prior = make_classifier(parts), make_prior(parts)
    make_inverter(parts / "model", classifier, prior)
    shards = extract_digits(parts, classifier, prior)
    copy_of("4", parts)
    state = parity.state_dict()
    parity.write_backbone(parts / "their-backbone")
    parity.write_prior(parts / "their-prior", state)
    run = inversion(classifier, prior, shards)
    run["trainer"] |= {**TRAINER, "enable_progress_bar": False, "max_steps": 1, "val_check_interval": 1}
    run["trainer"] |= {"default_root_dir": str(parts / "run")}
    run["trainer"]["callbacks"][0]["init_args"] |= {"dirpath": str(parts / "run/checkpoints")}
    run["data"]["init_args"] |= {"val": None, "test": {"clean": str(shards / "clean")}}
    fit = write(parts / "fit.yaml", run)
    main(["fit", "--config", fit])
    home = f"--trainer.default_root_dir={parts / 'scored/spatial'}"
    main(["test", "--config", fit, "--ckpt_path", str(parts / "run/checkpoints"), home])
    for name, source in (
        ("shards", shards / "clean"),
        ("shards read", shards / "clean"),
        ("checkpoint", parts / "run"),
    ):
        shutil.copytree(source, originals / name)
    shutil.copytree(parts / "scored", originals / "scores of a run")
    for name in ("configuration", "model folder", "authors' checkpoint", "concepts", "picture"):
        (originals / name).mkdir()
    shutil.copy(fit, originals / "configuration")
    shutil.copytree(parts / "model", originals / "model folder/model")
    torch.save({"state_dict": state, "global_step": 3}, originals / "authors' checkpoint/authors.ckpt")
    groups = [str(shards / name) for name in ("clean", "train")]
    main(["concepts", *groups, *DIFFERENCE, "--out", str(originals / "concepts")])
    shutil.copy(parts / "digit-4.png", originals / "picture/picture.png")
    return parts


# What authors of hostile files write, with the checksums that belong to it


def resealed(folder: Path) -> None:
    """Make a manifest agree with the shards and indices that are there."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        manifest = json.loads((folder / MANIFEST).read_text())
        for shard in manifest["shards"]:
            path = folder / shard["name"]
            index = index_path(path)
            contents = json.loads(index.read_text()) | {"bytes": path.stat().st_size, "sha256": sha256(path)}
            index.write_text(json.dumps(contents))
            shard |= {"index_sha256": sha256(index), "sha256": sha256(path), "bytes": path.stat().st_size}
        del manifest["manifest_sha256"]
        seal = hashlib.sha256(to_json(manifest)).hexdigest()
        (folder / MANIFEST).write_bytes(to_json({**manifest, "manifest_sha256": seal}))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def signed(folder: Path) -> None:
    (folder / SUMS).unlink(missing_ok=True)
    write_sums(folder)


def described(folder: Path) -> None:
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError, RecursionError):
        facts = json.loads((folder / FACTS).read_text())
        facts["sha256"] = seal((folder / DIRECTIONS).read_bytes(), facts)
        (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n")


def pickled(part: str) -> Spoil:
    """A pickle alone, as in old folders."""

    def spoil(model: Path) -> None:
        [weights] = (model / part).glob("*.safetensors")
        weights.unlink()
        name = "pytorch_model.bin" if part == "backbone" else weights.with_suffix(".bin").name
        torch.save({"conv_in.weight": spoils.Runs()}, model / part / name)

    return spoil


def outside(model: Path) -> None:
    """An index of weights in several files that names one elsewhere."""
    weights = model / "prior/unet" / UNET
    shutil.move(weights, model.parents[1] / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": {"conv_in.weight": "../../../../elsewhere.safetensors"}}
    weights.with_name(f"{UNET}.index.json").write_text(json.dumps(index))


def report_is_a_link(run: Path) -> None:
    links_to("../../outside")(run.parent / "report.html")


def appended(line: str) -> Spoil:
    return lambda path: path.write_text(f"{path.read_text()}\n{line}\n")


def values(*rows: tuple[Any, ...]) -> Spoils:
    """From places in a document and the value that is put there."""
    return {f"{'.'.join(map(str, where))} = {value!r}"[:60]: puts(*where, value=value) for *where, value in rows}


CONFIGURATIONS: Spoils = {
    "runs a command": holds("trainer: !!python/object/apply:os.system ['touch ../ran']"),
    "names a function": holds("model: !!python/name:os.system"),
    "a class of a command": appended("trainer+: {class_path: os.system}"),
    "based on itself": appended("base: fit.yaml"),
    "based on endless zeros": appended("base: /dev/zero"),
}
PATHS = ("../../outside.tar", "/etc/passwd", "a\0b.tar", "", "..", "x" * 5000)
SETS = values(
    *(("shards", 0, "name", name) for name in PATHS),
    ("shards", 0, "samples", 10**15), ("shards", []), ("settings", "storage", "int8"),
    ("provenance", "feature_shape", [10**9] * 3), ("provenance", "image_size", 10**9),
)  # fmt: skip
ENTRIES = values(
    *(("entries", 0, "members", "json", "offset", value) for value in (2**60, 2**70, -512)),
    ("entries", 0, "members", "features.npy", "size", -(2**34)), ("entries", 0, "members", {}),
    ("entries", []),
)  # fmt: skip
INDICES = values(
    ("image_size", 10**9), ("image_size", 1.5), ("input_size", 10**6), ("layer", "__init__"),
    ("sampler", "steps", 10**12), ("sampler", "guidance_scale", float("nan")),
    ("sampler", "scheduler", "__class__"), ("sampler", "__class__", "x"),
)  # fmt: skip
UNETS = values(
    ("block_out_channels", [10**6, 10**6]), ("layers_per_block", 10**9), ("block_out_channels", [10**12, 10**12]),
    ("down_block_types", ["__import__", "x"]), ("norm_eps", "word"), ("in_channels", 9),
)  # fmt: skip
CLASSIFIERS = values(
    ("model_args", "channels", [10**6] * 4), ("architecture", "../../outside"), ("pretrained_cfg", "std", "word"),
    ("pretrained_cfg", "input_size", [3, 10**6, 10**6]),
)  # fmt: skip
SCHEDULES = values(
    *(("num_train_timesteps", value) for value in (0, 10**10, 10**30)),
    ("beta_end", float("nan")), ("beta_schedule", "__class__"),
)  # fmt: skip
DESCRIPTIONS = values(
    ("names", ["a", "b", "c"]), ("names", []), ("method", "__class__"),
    ("origin", "feature_shape", [10**9] * 3), ("origin", "layer", "stages.0"),
)  # fmt: skip
SCORES = values(("scores", {"clean/cosine": 0.5}), ("samples", "clean", "word"), ("notes", [1]))


# Trials


class HangError(BaseException):
    """Not an Exception, so that nothing takes it for an error of its own."""


def trial(root: Path, kind: Kind, file: str, spoil: Spoil, sentence: str | None, authored: bool) -> str | None:
    """Spoil a file of an input and run the command that reads it; say what went wrong, if anything."""
    yard = root / "yard"
    place = yard / "place"
    shutil.rmtree(yard, ignore_errors=True)
    shutil.copytree(root / "originals" / kind.name, place / "in")
    (yard / "outside").write_text("precious")
    (place / "out").mkdir()
    with contextlib.chdir(place):
        path = next(Path("in").glob(file))
        spoil(path)
        files = [one for one in Path("in").rglob("*") if not one.is_dir()]
        if authored and SUMS not in file and all(one.is_file() and not one.is_symlink() for one in files):
            kind.reseal(Path("in"))
        before = listing(yard)
        reader._read_index.cache_clear()
        ended, said = run(kind.command)
        changed = {name for name, _ in before ^ listing(yard)} - {"place"}
    if (yard / "ran").exists():
        return "it ran code"
    allowed = r"place/(out(/.*)?|in|in/(report\.html|metrics\.json|overview\.png))"
    if elsewhere := [name for name in sorted(changed) if not re.fullmatch(allowed, name)]:
        return f"it wrote {elsewhere}"
    if ended == 0:
        harmless = not authored and contents(place / "out") == unspoilt(root, kind)
        return None if sentence is None or harmless else "it passed for valid"
    last = (said.strip().splitlines() or [""])[-1]
    lines = [line for line in said.splitlines() if line.startswith("featinv-pl: error: ")]
    if ended not in (1, 2) or "Traceback" in said or len(last) > 1500:
        return f"it ended with {ended}: {said[-2000:]}"
    if ended == 1 and (lines != [last] or not re.search(sentence or NAMED, last)):
        return f"it said: {said[-1500:]}"
    return None


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256(path) for path in folder.rglob("*") if path.is_file()}


@cache
def unspoilt(root: Path, kind: Kind) -> dict[str, str]:
    """What the command writes for the input as it was."""
    place = root / "unspoilt" / kind.name
    shutil.copytree(root / "originals" / kind.name, place / "in")
    (place / "out").mkdir()
    with contextlib.chdir(place):
        run(kind.command)
    return contents(place / "out")


def run(command: tuple[str, ...]) -> tuple[object, str]:
    """Run the public command, within limits: its exit status, or the name of what it raised, and what it said."""

    def stop(*_: object) -> None:
        raise HangError

    said = io.StringIO()
    virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (virtual + (MEGABYTES << 20), limits[1]))
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(said):
            main(list(command))
        return 0, said.getvalue()
    except SystemExit as stop_:
        verdict = "featinv-pl: error: " + out.getvalue() if command[0] == "verify" and stop_.code else ""
        return stop_.code, said.getvalue() + " ".join(verdict.split())[:1000].strip()
    except (Exception, HangError) as error:
        return type(error).__name__, said.getvalue() + traceback.format_exc()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def listing(folder: Path) -> set[tuple[str, tuple[int, ...]]]:
    """What lies below a folder, so that a change shows: kind and rights, size, time."""
    found = set()
    for path in folder.rglob("*"):
        stat = path.lstat()
        size_and_time = (stat.st_size, stat.st_mtime_ns) if path.is_symlink() or not path.is_dir() else ()
        found.add((path.relative_to(folder).as_posix(), (stat.st_mode, *size_and_time)))
    return found


def trials(root: Path, kind: Kind, number: int, every: int = 1) -> Iterator[tuple[str, str | None]]:
    """Spoil an input in every way of the table, or in some, and at random; say of each how it went wrong, if it did."""
    rows = [(file, name, spoil, sentence) for file, ways, sentence in kind.cases for name, spoil in ways.items()]
    rng = random.Random(kind.name)
    for file, name, spoil, sentence in rows[rng.randrange(every) :: every]:
        yield f"{file}: {name}", trial(root, kind, file, spoil, sentence, authored=True)
    for _ in range(number):
        file = rng.choice([file for file, *_ in kind.cases if file not in ("model", "spatial")])
        seed = rng.random()
        damage = partial(spoils.random_damage, rng=random.Random(seed))
        sentence = NAMED if kind.checked else None
        yield f"{file}: random damage {seed}", trial(root, kind, file, damage, sentence, authored=False)
        if any(ways is JSONS or "deep" in ways for name, ways, _ in kind.cases if name == file):
            other = partial(spoils.random_value, rng=random.Random(seed))
            yield f"{file}: random value {seed}", trial(root, kind, file, other, None, authored=True)


def damage_files(root: Path, number: int) -> Iterator[Figure]:
    """A line of the table for each kind of input."""
    with contextlib.redirect_stdout(io.StringIO()):
        parts = make_originals(root)
    for kind in kinds(parts):
        ended = list(trials(root, kind, number))
        wrong = [f"{what}: {problem}" for what, problem in ended if problem]
        print(*wrong, sep="\n", end="\n" * bool(wrong))
        yield Figure(kind.name, "files spoilt", len(ended), len(wrong), "one sentence each")
