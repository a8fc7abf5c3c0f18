"""What the workflows of `experiments` share: what runs, what is reused, and what an interruption leaves."""

import subprocess
from pathlib import Path

from smoke.targets import PROJECT, make, started

SNAKEFILE = """
FOLDER = "runs"
STEPS = {
    "first": {"command": "--version --config a.yaml", "makes": ["made"], "needs": []},
    "second": {"command": "--version --config b.yaml", "makes": [], "needs": ["first"]},
    "other": {"command": "--version --config c.yaml", "makes": [], "needs": []},
}

rule all:
    input: lambda wildcards: [done(name) for name in STEPS]

include: "../workflow.smk"
"""


def test_steps_run_again_when_what_they_depend_on_has_changed() -> None:
    """Of a small workflow, whose commands take no time."""
    Path("experiments/digits").mkdir(parents=True)
    for name in ("workflow.smk", "step.sh"):
        Path("experiments", name).symlink_to(PROJECT / "experiments" / name)
    Path("experiments/digits/Snakefile").write_text(SNAKEFILE)
    Path("made").touch()
    files = {"a.yaml": "name: a", "b.yaml": "base: base.yaml", "c.yaml": "name: c", "base.yaml": "seed: 1"}

    def runs(**changed: str) -> list[str]:
        """The configurations whose steps `make demo` runs, after some have changed."""
        for name, content in (files | {f"{name}.yaml": content for name, content in changed.items()}).items():
            Path(name).write_text(content)
        return sorted(command[-1] for command in started(make("demo", short=False)))

    assert runs() == ["a.yaml", "b.yaml", "c.yaml"]
    assert runs(a="name: a # as before", base="seed: 2") == ["b.yaml"]
    assert runs(a="name: other") == ["a.yaml", "b.yaml"]
    assert runs() == []  # which is there


def step(digest: str, script: str) -> subprocess.CompletedProcess[str]:
    command = [PROJECT / "experiments/step.sh", "runs", "a name", digest, "runs/model", "bash", "-c", script]
    return subprocess.run(["bash", *command], text=True, capture_output=True)


def test_an_interrupted_step_resumes_and_a_changed_one_starts_over() -> None:
    begin = "mkdir -p runs/model && echo begun >> runs/model/file && echo a line"
    failed = step("one", f"{begin} && exit 3")
    assert (failed.returncode, failed.stderr) == (3, "a line\n")
    assert not Path("runs/steps/a name.one").exists()
    assert step("one", begin).returncode == 0
    assert Path("runs/model/file").read_text() == "begun\nbegun\n"
    assert Path("runs/steps/a name.one").read_text().strip().isdigit()
    assert Path("runs/steps/a name.log").read_text() == "a line\na line\n"

    assert step("two", begin).returncode == 0
    assert Path("runs/model/file").read_text() == "begun\n"
    [moved] = Path("runs/earlier/a name").iterdir()
    assert (moved / "file").read_text() == "begun\nbegun\n"


def test_a_folder_that_no_step_has_made_is_not_deleted() -> None:
    Path("runs/model").mkdir(parents=True)
    Path("runs/model/mine").touch()
    assert step("one", "mkdir runs/model").returncode == 0
    [moved] = Path("runs/earlier/a name").iterdir()
    assert (moved / "mine").exists()


def test_starting_over_keeps_what_is_there() -> None:
    Path("experiments/digits").mkdir(parents=True)
    Path("experiments/digits/Snakefile").write_text("rule all:\n    shell: 'mkdir runs/demo'\n")
    Path("runs/demo").mkdir(parents=True)
    Path("runs/demo/mine").touch()
    make("demo", short=False, FRESH="1")
    assert not any(Path("runs/demo").iterdir())
    [kept] = Path("runs").glob("demo-*")
    assert (kept / "mine").exists()
