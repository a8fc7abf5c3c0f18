"""Every shipped YAML says what the code accepts."""

from pathlib import Path

import pytest
import yaml

from featinv_pl.cli import effective_config

ROOT = Path(__file__).parents[1]
EXPERIMENTS = ROOT / "experiments"
COMMANDS = {"extract.yaml": "predict", "adversarial.yaml": "predict"}
OVERLAYS = {
    "imagenet/test/robustness.yaml",
    "trainer.yaml",
    "debug.yaml",
    "bench/profile.yaml",
    "digits/inversion.yaml",
    "digits/trainer.yaml",
}


def names() -> list[str]:
    return sorted(path.relative_to(EXPERIMENTS).as_posix() for path in EXPERIMENTS.rglob("*.yaml"))


@pytest.mark.parametrize("name", names())
def test_yaml_is_parsed(name: str) -> None:
    """Overlays are laid over a whole experiment; all others stand alone."""
    config = ["--config", str(EXPERIMENTS / name)]
    if name in OVERLAYS:
        config = ["--config", str(EXPERIMENTS / "digits/spatial.yaml"), *config]
    command = COMMANDS.get(Path(name).name, "fit")
    parsed = yaml.safe_load(effective_config([command, *config]))[command]
    assert parsed["model"]["class_path"].startswith("featinv_pl.")
    again = Path("again.yaml")
    again.write_text(yaml.safe_dump(parsed))
    assert yaml.safe_load(effective_config([command, "--config", str(again)]))[command] == parsed


def test_schedules_end_with_training() -> None:
    """OneCycleLR raises after its last step, and never gets there if it is longer than training."""
    for name in names():
        if name.startswith("digits/") and not name.endswith(("extract.yaml", "adversarial.yaml", "trainer.yaml")):
            parsed = yaml.safe_load(effective_config(["fit", "--config", str(EXPERIMENTS / name)]))["fit"]
            schedule = parsed["model"]["init_args"]["lr_scheduler"]["init_args"]
            assert schedule["total_steps"] == parsed["trainer"]["max_steps"], name


def test_corrupted_sources_have_at_least_four_corruptions_at_two_severities() -> None:
    config = str(EXPERIMENTS / "digits/extract.yaml")
    parsed = yaml.safe_load(effective_config(["predict", "--config", config]))["predict"]
    severities: dict[str, set[str]] = {}
    for source in parsed["data"]["init_args"]["sources"]:
        if source.startswith("corrupted/"):
            _, corruption, severity = source.split("/")
            severities.setdefault(corruption, set()).add(severity)
    assert len(severities) >= 4
    assert min(map(len, severities.values())) >= 2
