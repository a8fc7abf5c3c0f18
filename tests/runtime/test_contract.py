"""What is used of Lightning without its promise is there, and is used in `runtime/` alone."""

import ast
from pathlib import Path
from typing import Any

import pytest
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loops.progress import _BatchProgress

import featinv_pl

SOURCE = Path(featinv_pl.__file__).parent
NAMES = {
    "trainer": ("_logger_connector", "_checkpoint_connector", "_accelerator_connector", "fit_loop", "validate_loop"),
    "trainer.validate_loop": ("verbose",),
    "trainer.fit_loop": (
        *("_should_accumulate", "_data_fetcher", "epoch_loop", "epoch_progress", "max_steps", "max_epochs"),
        "reset_restart_stage",
    ),
    "trainer.fit_loop.epoch_progress.current": ("ready", "started", "processed"),
    "trainer.fit_loop.epoch_loop": ("_should_check_val_fx", "batch_progress", "max_steps"),
    "trainer.fit_loop.epoch_loop.batch_progress": ("total", "current", "is_last_batch"),
    "trainer.fit_loop.epoch_loop.batch_progress.total": ("processed", "completed"),
    "trainer._logger_connector": ("_callback_metrics", "update_train_step_metrics"),
    "trainer._checkpoint_connector": ("hpc_save_path",),
    "trainer._accelerator_connector": ("cluster_environment",),
    "saver": (
        *("_should_skip_saving_checkpoint", "_monitor_candidates", "_save_topk_checkpoint", "_save_last_checkpoint"),
        *("_defer_save_until_validation", "_last_global_step_saved"),
    ),
    "average": ("_average_model", "_device", "_swap_models"),
    "cli": ("_parse_ckpt_path", "_add_instantiators", "subcommands"),
    "observer": ("_child_processes",),
}


@pytest.fixture(scope="module")
def objects() -> dict[str, Any]:
    trainer = Trainer(
        accelerator="cpu", fast_dev_run=1, logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.fit(BoringModel())
    observer = _ChildProcessObserver(main_pid=0, child_processes=[])
    others = {"saver": ModelCheckpoint(), "average": WeightAveraging(), "cli": LightningCLI, "observer": observer}
    return {"trainer": trainer, **others}


@pytest.mark.parametrize("place", NAMES)
def test_lightning_has_what_we_use(place: str, objects: dict[str, Any]) -> None:
    name, *attributes = place.split(".")
    found = objects[name]
    for attribute in attributes:
        found = getattr(found, attribute)
    assert [name for name in NAMES[place] if not hasattr(found, name)] == []


def test_checkpoints_have_the_progress_that_we_change(objects: dict[str, Any]) -> None:
    state = objects["trainer"].fit_loop.state_dict()
    assert state["epoch_progress"]["current"].keys() >= {"processed"}
    for part in ("epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress"):
        assert state[part].keys() == {"total", "current", "is_last_batch"} == vars(_BatchProgress()).keys()
        assert state[part]["total"].keys() == {"ready", "started", "processed", "completed"}


def test_private_names_are_used_in_one_room_alone() -> None:
    private = {name for names in NAMES.values() for name in names if name.startswith("_")}
    loops = {"fit_loop", "validate_loop", "test_loop", "predict_loop", "epoch_loop", "hpc_save_path"}
    found = []
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls"):
                unlisted = node.attr.startswith("_") and node.attr not in {*private, "_exit"} and node.attr[1] != "_"
                if unlisted if path.parent.name == "runtime" else node.attr in private | loops:
                    found.append(f"{path.relative_to(SOURCE)}:{node.lineno}: {node.attr}")
    assert found == []
