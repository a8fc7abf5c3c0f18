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

import torch

import parity
from conftest import copy_of
from featinv_pl.__main__ import main
from featinv_pl.data.shards import reader
from featinv_pl.data.shards.manifest import MANIFEST, index_path, write_manifest
from featinv_pl.explore.concepts import FACTS, seal
from featinv_pl.explore.concepts import TENSORS as DIRECTIONS
from featinv_pl.nets.hub import INDEX, SUMS, write_sums
from tiny import extract_digits, inversion, make_classifier, make_inverter, make_prior, write
from torture import Figure, spoils
from torture.spoils import ANY, HEADERS, JSONS, TENSORS, Spoil, Spoils, holds, links_to, values

DIFFERENCE = ("--method=difference",)
SECONDS, MEGABYTES = 120, 1536  # more is a hang, or a hunger; a hostile file is small
WEIGHTS, UNET = "diffusion_pytorch_model.safetensors", "model/prior/unet"
NAMED = r"in/|'in'|--concepts belongs to"
UNREADABLE = r"damaged|no file|not a|is no |No such|Is a directory|cannot be read|empty"
TAMPERED = rf"files of 'in/model' are not as SHA256SUMS in it says|{UNREADABLE}|lacks|does not say"
OTHER_WEIGHTS = r"could not be loaded|are missing|not finite|damaged|lacks \d+ weights"
SCHEDULE = "in/model/prior/scheduler/scheduler_config.json"
INCOMPLETE = (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError)


@dataclass(frozen=True, eq=False)
class Kind:
    """A kind of input."""

    name: str
    command: tuple[str, ...]  # what reads it, from a folder that holds it as `in/`
    # A file or pattern, ways to spoil it, and how each must be refused; None where it may be valid.
    cases: tuple[tuple[str, Spoils, str | None], ...]
    reseal: Callable[[Path], object] = lambda folder: None  # makes checksums agree with what the author has spoilt
    checked: bool = True  # every random change of bytes must show


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def resealed(folder: Path) -> None:
    """Make a manifest agree with the shards and indices that are there."""
    with contextlib.suppress(*INCOMPLETE):
        manifest = json.loads((folder / MANIFEST).read_text())
        for shard in manifest["shards"]:
            path = folder / shard["name"]
            index, facts = index_path(path), {"bytes": path.stat().st_size, "sha256": sha256(path)}
            index.write_text(json.dumps(json.loads(index.read_text()) | facts))
            shard |= {**facts, "index_sha256": sha256(index)}
        write_manifest(folder, manifest)


def signed(folder: Path) -> None:
    (folder / "model" / SUMS).unlink(missing_ok=True)
    write_sums(folder / "model")


def described(folder: Path) -> None:
    with contextlib.suppress(*INCOMPLETE):
        facts = json.loads((folder / FACTS).read_text())
        facts["sha256"] = seal((folder / DIRECTIONS).read_bytes(), facts)
        (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n")


def pickled(model: Path, part: str, name: str) -> None:
    next((model / part).glob("*.safetensors")).unlink()
    torch.save({"conv_in.weight": spoils.RUNS}, model / part / name)


def outside(model: Path) -> None:
    """An index of weights in several files that names one elsewhere."""
    weights = model / "prior/unet" / WEIGHTS
    shutil.move(weights, model.parents[1] / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": {"conv_in.weight": "../../../../elsewhere.safetensors"}}
    weights.with_name(f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def appended(line: str) -> Spoil:
    return lambda path: path.write_text(f"{path.read_text()}\n{line}\n")


CONFIGURATIONS: Spoils = {
    "runs a command": holds(b"trainer: !!python/object/apply:os.system ['touch ../ran']"),
    "names a function": holds(b"model: !!python/name:os.system"),
    "a class of a command": appended("trainer+: {class_path: os.system}"),
    "based on itself": appended("base: fit.yaml"),
    "based on endless zeros": appended("base: /dev/zero"),
}
SETS = values({
    "shards/0/name": ("../../outside.tar", "/etc/passwd", "a\0b.tar", "", "..", "x" * 5000),
    "shards/0/samples": [10**15], "shards": [[]], "settings/storage": ["int8"],
    "provenance/feature_shape": [[10**9] * 3], "provenance/image_size": [10**9],
})  # fmt: skip
ENTRIES = values({
    "entries/0/members/json/offset": (2**60, 2**70, -512), "entries/0/members/features.npy/size": [-(2**34)],
    "entries/0/members": [{}], "entries": [[]],
})  # fmt: skip
INDICES = values({
    "image_size": (10**9, 1.5), "input_size": [10**6], "layer": ["__init__"], "sampler/steps": [10**12],
    "sampler/guidance_scale": [float("nan")], "sampler/scheduler": ["__class__"], "sampler/__class__": ["x"],
})  # fmt: skip
UNETS = values({
    "block_out_channels": ([10**6, 10**6], [10**12, 10**12]), "layers_per_block": [10**9],
    "down_block_types": [["__import__", "x"]], "norm_eps": ["word"], "in_channels": [9],
})  # fmt: skip
CLASSIFIERS = values({
    "model_args/channels": [[10**6] * 4], "architecture": ["../../outside"], "pretrained_cfg/std": ["word"],
    "pretrained_cfg/input_size": [[3, 10**6, 10**6]],
})  # fmt: skip
SCHEDULES = values({
    "num_train_timesteps": (0, 10**10, 10**30), "beta_end": [float("nan")], "beta_schedule": ["__class__"],
})  # fmt: skip
DESCRIPTIONS = values({
    "names": (["a", "b", "c"], []), "method": ["__class__"], "origin/feature_shape": [[10**9] * 3],
    "origin/layer": ["stages.0"],
})  # fmt: skip
SCORES = values({"scores": [{"clean/cosine": 0.5}], "samples/clean": ["word"], "notes": [[1]]})
FOLDERS: Spoils = {
    "pickle of prior/unet": partial(pickled, part="prior/unet", name="diffusion_pytorch_model.bin"),
    "pickle of backbone": partial(pickled, part="backbone", name="pytorch_model.bin"),
    "weights outside": outside,
}


def kinds(parts: Path) -> list[Kind]:
    """All kinds, for what `make_originals` has written to `parts`."""
    model, digit = str(parts / "model"), str(parts / "digit-4.png")
    documents, tables = {**ANY, **JSONS}, {**HEADERS, **TENSORS}
    unsigned = {name: one for name, one in ANY.items() if name not in ("missing", "link to itself")}
    shard = (
        (MANIFEST, documents, rf"in/.*({UNREADABLE})|manifest"),
        (MANIFEST, SETS, NAMED),
        ("*-00000.json", {**documents, **ENTRIES}, NAMED),
        ("*.tar", {**ANY, **spoils.MEMBERS}, NAMED),
    )
    run = (
        ("checkpoints/inversion.ckpt", {**ANY, **spoils.ARCHIVES, **spoils.CONTENTS, **spoils.RUN_CODE},
         r"inversion.ckpt' is damaged|no file '|'in' holds no"),
        ("checkpoints/inversion.ckpt", spoils.WEIGHTS, OTHER_WEIGHTS),
    )  # fmt: skip
    folder = (
        (f"model/{INDEX}", documents, TAMPERED),
        (f"model/{SUMS}", unsigned, TAMPERED),
        (f"model/{INDEX}", INDICES, r"'in/model|in/model/"),
        (f"model/{INDEX}", values({"prior": ["$(touch ../ran)"]}), None),
        (f"{UNET}/config.json", documents, rf"{UNREADABLE}|no file|{OTHER_WEIGHTS}"),
        (f"{UNET}/config.json", UNETS, r"in/model/prior"),
        ("model/backbone/config.json", CLASSIFIERS, r"in/model/backbone"),
        (SCHEDULE.removeprefix("in/"), SCHEDULES, rf"{SCHEDULE}' does not describe a schedule"),
        (f"{UNET}/{WEIGHTS}", tables, OTHER_WEIGHTS),
        (f"model/controlnet/{WEIGHTS}", tables, OTHER_WEIGHTS),
        ("model/backbone/model.safetensors", tables, r"in/model"),
        ("model/prior/prompts.safetensors", HEADERS, r"prompts.safetensors' is damaged"),
        ("model", FOLDERS, r"could not be loaded|not in its folder"),
    )
    authors = (
        ("authors.ckpt", {**ANY, "zip bomb": spoils.zip_bomb}, "in/authors.ckpt' is damaged|no file '"),
        ("authors.ckpt", spoils.RUN_CODE, "would call posix.system when loaded"),
        ("authors.ckpt", spoils.CONTENTS, "holds no tensors"),
        ("authors.ckpt", spoils.WEIGHTS, OTHER_WEIGHTS),
    )
    concepts = (
        (FACTS, documents, NAMED),
        (FACTS, DESCRIPTIONS, r"in/|'in'|--concepts"),
        (FACTS, values({"names/0": ["../../outside"]}), None),
        (DIRECTIONS, {**ANY, **tables}, NAMED),
    )
    scored = (
        ("spatial/metrics.json", {**documents, **SCORES}, r"in/spatial/metrics.json|'in'"),
        ("spatial/pictures/*/first/tiles.json", documents, None),
        ("spatial/pictures/*/first/original.png", {**ANY, **spoils.PICTURES}, None),
        ("report.html", {"report is a link": links_to("../../outside")}, None),
    )
    fit = (("fit.yaml", CONFIGURATIONS, r"in/fit\.yaml|not trusted|base: "), ("fit.yaml", ANY, None))
    theirs = (f"--model.backbone={parts}/their-backbone", f"--model.prior={parts}/their-prior")
    steered = ("steer", "--model", model, digit, "--concepts", "in", "--strengths=0,1", "--out", "out")
    sampled = ("reconstruct", "--model", "in/model", digit, "--num_samples=1", "--out", "out")
    found = ("concepts", "in", *DIFFERENCE, "--between", "3", "8", "--out", "out")
    picture = (("picture.png", {**ANY, **spoils.PICTURES}, r"in/picture.png"),)
    compared = ("compare", "in/picture.png", "--models", model, "--out", "out")
    return [
        Kind("configuration", ("fit", "--config", "in/fit.yaml", "--print_config"), fit, checked=False),
        Kind("shards", ("verify", "in"), shard, resealed),
        Kind("shards read", found, shard, resealed),
        Kind("checkpoint", ("export", "in", "out/model"), run),
        Kind("model folder", sampled, folder, signed),
        Kind("authors' checkpoint", ("import", "in/authors.ckpt", "out/model", *theirs), authors),
        Kind("concepts", steered, concepts, described),
        Kind("picture", compared, picture, checked=False),
        Kind("scores of a run", ("report", "in"), scored, checked=False),
    ]


def make_originals(root: Path) -> Path:
    """Write a valid input of every kind below `root/originals`, and the parts that commands need; return the parts."""
    parts, originals = root / "parts", root / "originals"
    for name in ("configuration", "authors' checkpoint", "picture"):
        (originals / name).mkdir(parents=True)
    parts.mkdir()
    classifier, prior = make_classifier(parts), make_prior(parts)
    make_inverter(parts / "model", classifier, prior)
    shards = extract_digits(parts, classifier, prior)
    state = parity.state_dict()
    parity.write_backbone(parts / "their-backbone")
    parity.write_prior(parts / "their-prior", state)
    run = inversion(classifier, prior, shards)
    run["trainer"] |= {"enable_progress_bar": False, "max_steps": 1, "val_check_interval": 1}
    run["trainer"] |= {"default_root_dir": str(originals / "checkpoint")}
    checkpoints = str(originals / "checkpoint/checkpoints")
    run["trainer"]["callbacks"][0]["init_args"]["dirpath"] = checkpoints
    run["data"]["init_args"] |= {"val": None, "test": {"clean": str(shards / "clean")}}
    fit = write(originals / "configuration/fit.yaml", run)
    main(["fit", "--config", fit])
    scored = f"--trainer.default_root_dir={originals / 'scores of a run/spatial'}"
    main(["test", "--config", fit, "--ckpt_path", checkpoints, scored])
    shutil.copytree(shards / "clean", originals / "shards")
    shutil.copytree(shards / "clean", originals / "shards read")
    shutil.copytree(parts / "model", originals / "model folder/model")
    torch.save({"state_dict": state, "global_step": 3}, originals / "authors' checkpoint/authors.ckpt")
    groups = [str(shards / name) for name in ("clean", "train")]
    main(["concepts", *groups, *DIFFERENCE, "--out", str(originals / "concepts")])
    shutil.copy(copy_of("4", parts), originals / "picture/picture.png")
    return parts


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
        spoil(next(Path("in").glob(file), Path("in", file)))
        files = [one for one in Path("in").rglob("*") if not one.is_dir()]
        if authored and SUMS not in file and all(one.is_file() and not one.is_symlink() for one in files):
            kind.reseal(Path("in"))
        before = listing(yard)
        reader._read_index.cache_clear()
        reader._open.cache_clear()
        ended, said = run(kind.command)
        changed = {name for name, _ in before ^ listing(yard)} - {"place"}
    if (yard / "ran").exists():
        return "it ran code"
    allowed = r"place/(out(/.*)?|in|in/(report\.html|metrics\.json))"
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
    files = [file for file, *_ in kind.cases if file not in ("model", "report.html")]
    documents = {file for file, ways, _ in kind.cases if "deep" in ways}
    for _ in range(number):
        file, seed = rng.choice(files), rng.random()
        damage = partial(spoils.random_damage, rng=random.Random(seed))
        sentence = NAMED if kind.checked else None
        yield f"{file}: random damage {seed}", trial(root, kind, file, damage, sentence, authored=False)
        if file in documents:
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
