# What the workflows share. The including file sets FOLDER, below which all results are, and STEPS: by name a public
# command, the results that it `makes`, and the steps that it `needs`.
import functools
import hashlib
import json
import os
import shlex
import sys
from importlib.metadata import version
from pathlib import Path

import yaml

os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
os.environ.pop("FEATINV_CONFIG", None)  # settings that no digest knows of
for variable, value in (("WANDB_SILENT", "true"), ("WANDB_MODE", "offline")):  # nobody asked to publish these runs
    os.environ.setdefault(variable, value)


def command(name):
    """The words of a step's command, with the overlay, if any, over its configuration."""
    words = ["featinv-pl", *shlex.split(STEPS[name]["command"])]
    return [*words, "--config", config["overlay"]] if "overlay" in config and "--config" in words else words


def settings(file):
    """The content of a configuration, after that of its bases."""
    content = yaml.safe_load(Path(file).read_text()) or {}
    bases = content.get("base", [])
    return [*(settings(Path(file).parent / base) for base in ([bases] if isinstance(bases, str) else bases)), content]


@functools.cache
def digest(name):
    """What the result of a step depends on: the package, its command, its settings, and the steps that it needs."""
    configs = [settings(word) for word in command(name) if word.endswith(".yaml")]
    needed = [digest(need) for need in STEPS[name]["needs"]]
    parts = [version("featinv-pl"), command(name), configs, needed, STEPS[name].get("stamp")]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


def done(name):
    """The file that step.sh leaves at the end of a step: with another digest it is another file."""
    return f"{FOLDER}/steps/{name}.{digest(name)}"


def result(name):
    """The folder that a training or an extraction fills, and in which it resumes."""
    [made, *_] = STEPS[name]["makes"] or [""]
    return {"fit": os.path.dirname(made), "predict": made}.get(command(name)[1], "")


for name, step in STEPS.items():
    if not all(Path(path).exists() for path in step["makes"]):
        Path(done(name)).unlink(missing_ok=True)

    rule:
        name: name
        input: [done(need) for need in step["needs"]]
        output: done(name)
        params:
            script=str(Path(workflow.current_basedir) / "step.sh"),
            words=shlex.join([FOLDER, name, digest(name), result(name), *command(name)]),
        log: f"{FOLDER}/steps/{name}.log"
        message: shlex.join(command(name)).replace("{", "{{").replace("}", "}}")  # which is formatted
        shell: "bash {params.script:q} {params.words}"
