"""A study: the same inversion with one thing changed at a time, over several seeds, in one table."""

import contextlib
import json
import logging
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tqdm import tqdm

from featinv_pl.config import merge
from featinv_pl.errors import UserError, user_error
from featinv_pl.evaluation.methods import INVERSION, LABELS
from featinv_pl.evaluation.pictures import FIRST, PICTURES
from featinv_pl.evaluation.results import METRICS, Name, aligned, by_name, read_document
from featinv_pl.explore.study import SCORES, Row, cells, dots, markdown, strips
from featinv_pl.files import read_yaml, write_bytes
from featinv_pl.publishing import export
from featinv_pl.stages import Stage, fingerprint, minutes, run_once

CHECKPOINT, MODEL, LOG = "inversion.ckpt", "model", "log.txt"
OWN = "own"
PLAIN_NAME = re.compile(r"[\w+(][\w .,+()=-]{0,99}")  # no path, so that no run is written outside the study's folder


class Preparation(BaseModel):
    """A command that runs once, before all runs."""

    model_config = ConfigDict(extra="forbid")
    command: str
    makes: Path


class Run(BaseModel):
    """One way of training; each sampler among its arms is a row of the table too."""

    model_config = ConfigDict(extra="forbid")
    config: Path | None = None
    """If not that of the plan."""
    set: dict[str, Any] = {}
    """Settings over the configuration."""
    adapts: str | None = None
    """Another run, whose model of the same seed this one starts from (`--model.control`)."""


class Plan(BaseModel):
    """The content of a study's YAML file."""

    model_config = ConfigDict(extra="forbid")
    folder: Path
    needs: list[Path] = []
    """What other commands have made; a change of any runs everything again."""
    prepare: list[Preparation] = []
    config: Path
    """The configuration that all runs change. It leaves the checkpoint as `inversion.ckpt`."""
    source: str
    """The test source whose scores are compared."""
    seeds: list[int] = Field(min_length=1)
    runs: dict[str, Run] = Field(min_length=1)
    """By name; the first is what the others are compared with."""


@dataclass(frozen=True)
class Job:
    """One run with one seed.

    Attributes:
        folder: Where everything of it lies.
        stages: Its fit and its test.
        exports: Whether another run starts from its model.
    """

    folder: Path
    stages: tuple[Stage, Stage]
    exports: bool


def study(path: Path, jobs: int, config: Path | None = None) -> bool:
    """Run a study, or what is missing of it.

    Its folder gets the table as `study.md` and `study.json`, all scores as `study.png`, and the first images of each
    row as `pictures.png`.

    Args:
        path: Its YAML file; see `Plan`.
        jobs: Processes that work on runs at the same time.
        config: An overlay for every command, such as experiments/debug.yaml.

    Returns:
        Whether all runs have succeeded; the table shows those that have.
    """
    plan = read_plan(path)
    overlay = () if config is None else ("--config", str(config))
    made = [_stamp(plan.needs, path)]
    for number, preparation in enumerate(plan.prepare, 1):
        print(f"[{number}/{len(plan.prepare)}] featinv-pl {preparation.command}", flush=True)
        command = (*_command(preparation.command, path), *overlay)
        stage = Stage(f"prepare {number}", command, (preparation.makes,), fingerprint(command, *made))
        reused, seconds = run_once(stage, plan.folder)
        print(f"      {'reused, done before' if reused else 'done'} in {minutes(seconds)}", flush=True)
        made.append(stage.fingerprint)
    failures: list[str] = []
    for adapting in (False, True):  # those that start from others come after them
        names = [name for name, run in plan.runs.items() if (run.adapts is not None) == adapting]
        failures += _work([job(plan, name, seed, made, overlay) for seed in plan.seeds for name in names], jobs)
    rows = _rows(plan)
    write_bytes(plan.folder / "study.json", (json.dumps([asdict(row) for row in rows], indent=2) + "\n").encode())
    write_bytes(plan.folder / "study.md", markdown(rows).encode())
    write_bytes(plan.folder / "study.png", dots(rows))
    if pictures := _pictures(plan, rows):
        write_bytes(plan.folder / "pictures.png", strips(pictures))
    print("\n" + aligned(cells(rows)))
    for failure in failures:
        print(f"Failed: {failure}", file=sys.stderr)
    print(f"Table in {plan.folder / 'study.md'}, picture in {plan.folder / 'study.png'}")
    return not failures


def read_plan(path: Path) -> Plan:
    """Read a study's YAML file."""
    contents = read_yaml(path, "PLAN", "Give the YAML file of a study.")
    try:
        plan = Plan.model_validate(contents)
    except ValidationError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"PLAN: '{path}' is no plan of a study ({reason}).") from error
    for name, run in plan.runs.items():
        if not PLAIN_NAME.fullmatch(name):
            raise UserError(
                f"PLAN: in '{path}' a run is called {name[:100]!r}, which is no name for its folder. Use letters, "
                "digits, spaces and - _ . + , ( ) alone."
            )
        if run.adapts is not None and (run.adapts not in plan.runs or plan.runs[run.adapts].adapts is not None):
            raise UserError(f"PLAN: in '{path}' the run '{name}' adapts '{run.adapts}', which is no run of its own.")
    return plan


def _command(line: str, path: Path) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(line))
    except ValueError as error:  # half a quotation
        raise UserError(f"PLAN: in '{path}' the command \"{line[:200]}\" cannot be read ({error}).") from error


def job(plan: Plan, name: str, seed: int, made: Sequence[str], overlay: tuple[str, ...] = ()) -> Job:
    """One run with one seed, as public commands; its settings are written to its folder.

    Args:
        plan: The study.
        name: Of the run.
        seed: Of its training and its samples.
        made: Fingerprints of what it reads.
        overlay: Options that come after its own configuration.
    """
    run, folder = plan.runs[name], plan.folder / name / str(seed)
    settings: dict[str, Any] = {"seed_everything": seed, "trainer": {"default_root_dir": str(folder)}}
    needed = list(made)
    if run.adapts is not None:
        origin = job(plan, run.adapts, seed, made, overlay)
        settings["model"] = {"init_args": {"control": str(origin.folder / MODEL)}}
        needed.append(origin.stages[0].fingerprint)
    own = folder / "run.yaml"
    write_bytes(own, yaml.safe_dump(merge(run.set, settings), sort_keys=False).encode())
    config = ("--config", str(run.config or plan.config), "--config", str(own), *overlay)
    fit, test = ("fit", *config), ("test", *config, "--ckpt_path", str(folder / CHECKPOINT))
    fitted = Stage("fit", fit, (folder / CHECKPOINT,), fingerprint(fit, *needed))
    tested = Stage("test", test, (folder / METRICS,), fingerprint(test, fitted.fingerprint))
    return Job(folder, (fitted, tested), name in {other.adapts for other in plan.runs.values()})


def _stamp(needs: Sequence[Path], path: Path) -> str:
    """What tells whether files have changed: names, sizes and times, as for make."""
    for needed in needs:
        if not needed.exists():
            raise UserError(f"PLAN: there is no '{needed}', which '{path}' needs. Make it first; see the file's head.")
    files = sorted(file for needed in needs for file in ([needed] if needed.is_file() else needed.rglob("*")))
    return json.dumps([(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files])


def _work(todo: Sequence[Job], jobs: int) -> list[str]:
    """Do jobs in processes of their own; one that fails does not stop the others. Returns what has failed."""
    failures = []
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_quiet) as pool:
        futures = {pool.submit(_do, one): one for one in todo}
        try:
            for future in tqdm(as_completed(futures), "runs", len(futures), unit="run"):
                if error := future.exception():
                    failures.append(f"{futures[future].folder}: {error} (see {futures[future].folder / LOG})")
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    return failures


def _quiet() -> None:
    """Lightning's messages go to the terminal that it was imported in: keep it for the progress of all runs."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _do(one: Job) -> None:
    """Fit, test, and export where that is asked for. What is printed goes to a file."""
    with (
        (one.folder / LOG).open("a") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        try:
            reused, _ = run_once(one.stages[0], one.folder)
            model = one.folder / MODEL
            if one.exports and not (reused and model.exists()):
                shutil.rmtree(model, ignore_errors=True)
                export(one.folder, model)
            run_once(one.stages[1], one.folder)
        except ValueError as error:
            raise user_error(error) from None


def _rows(plan: Plan) -> list[Row]:
    """A row for each run and each of its samplers, with the scores of all seeds that are done."""
    rows = []
    for name in plan.runs:
        paths = [plan.folder / name / str(seed) / METRICS for seed in plan.seeds]
        found = [by_name(read_document(path, "PLAN")) for path in paths if path.is_file()]
        arms = dict.fromkeys(key.method for run in found for key in run if key.test_set == plan.source)
        for arm in (INVERSION, *(arm for arm in arms if arm not in LABELS)):
            values = {
                score: [run[key]["value"] for run in found if (key := Name(plan.source, score, arm)) in run]
                for score in SCORES
            }
            rows.append(Row(name, OWN if arm == INVERSION else arm, values))
    return rows


def _pictures(plan: Plan, rows: Sequence[Row]) -> dict[str, Path]:
    """The strips that the first seed has left: originals, then those of each row."""
    found: dict[str, Path] = {}
    for row in rows:
        folder = plan.folder / row.run / str(plan.seeds[0]) / PICTURES / plan.source / FIRST
        found.setdefault("original", folder / "original.png")
        name = "reconstruction" if row.sampler == OWN else row.sampler
        found[f"{row.run}: {row.sampler}"] = folder / f"{name}.png"
    return {label: path for label, path in found.items() if path.is_file()}
