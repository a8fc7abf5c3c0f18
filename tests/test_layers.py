"""The layers of the design: upper may import lower, siblings never each other."""

import ast
from pathlib import Path

import featinv_pl

ROOT = Path(featinv_pl.__file__).parent
LAYERS = (
    {"types", "errors"},
    {"bars", "files", "decoding", "masking", "metrics", "sampling"},
    {"data", "nets"},
    {"runtime", "pages", "inverter"},
    {"tasks", "evaluation", "explore"},
    {"mistakes"},
    {"trust"},
    {"config", "publishing", "options"},
    {"commands"},
    {"cli"},
    {"completion"},
    {"__main__"},
)
NO_LIGHTNING = ("inverter", "nets", "sampling", "metrics", "types", "errors", "bars", "decoding", "files")


def imports(path: Path) -> set[str]:
    """Every module that a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def level(name: str) -> int:
    return next(number for number, rooms in enumerate(LAYERS) if name in rooms)


MODULES = [path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py"]


def test_imports_point_down() -> None:
    assert {room(path) for path in MODULES} == set.union(*LAYERS)
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in MODULES
        for name in imports(path)
        if name.startswith("featinv_pl.")
        if (there := name.split(".")[1]) != room(path) and level(there) >= level(room(path))
    ]
    assert not wrong, "\n".join(wrong)


def test_networks_and_metrics_know_no_lightning_and_no_wandb() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in MODULES
        if room(path) in NO_LIGHTNING
        for name in imports(path)
        if name.split(".")[0] in {"lightning", "pytorch_lightning", "wandb"}
    ]
    assert not wrong, "\n".join(wrong)
