"""What is used of other libraries without their promise is there; that of Lightning is used in `runtime/` alone."""

import ast
import inspect
import re
import tomllib
from multiprocessing import forkserver, spawn
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loops.progress import _BatchProgress
from torch.nn import Parameter
from torch.optim import AdamW

import featinv_pl

SOURCE = Path(featinv_pl.__file__).parent
NAMES = {
    "trainer": (
        *("_logger_connector", "_checkpoint_connector", "_accelerator_connector", "_signal_connector"),
        *("fit_loop", "validate_loop"),
    ),
    "trainer.validate_loop": ("verbose",),
    "trainer.fit_loop": (
        *("_should_accumulate", "_data_fetcher", "epoch_loop", "epoch_progress", "max_steps", "max_epochs"),
        "reset_restart_stage",
    ),
    "trainer.fit_loop.epoch_progress.current": ("ready", "started", "processed"),
    "trainer.fit_loop.epoch_loop": ("_should_check_val_fx", "batch_progress", "max_steps", "_broadcast_sigterm_tensor"),
    "trainer._signal_connector": ("received_sigterm",),
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
    "wandb": ("_wandb_init",),
}


@pytest.fixture(scope="module")
def objects() -> dict[str, Any]:
    trainer = Trainer(
        accelerator="cpu", fast_dev_run=1, logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.fit(BoringModel())
    observer = _ChildProcessObserver(main_pid=0, child_processes=[])
    others = {"saver": ModelCheckpoint(), "average": WeightAveraging(), "cli": LightningCLI, "observer": observer}
    others["wandb"] = WandbLogger(offline=True)
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


# Other libraries, and Python's own

PUBLIC = {"_exit", "_replace", "_fields", "_asdict", "_foreach_copy_"}  # of os, named tuples, and torch for lists
OTHERS = {"multiprocessing": {"_forkserver"}, "torchmetrics": {"_NoTrainLpips"}}
"""Private names by library; the tests run with every Python that is supported, and other libraries are bounded."""


def test_private_names_of_others_are_few_and_bounded() -> None:
    trees = [ast.parse(path.read_text()) for path in SOURCE.rglob("*.py") if path.parent.name != "runtime"]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    ours = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    ours |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    ours |= {node.target.id for node in nodes if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    used |= {part for node in nodes if isinstance(node, ast.ImportFrom) for part in (node.module or "").split(".")}
    used |= {name.name for node in nodes if isinstance(node, ast.ImportFrom) for name in node.names}
    private = {name for name in used - ours - PUBLIC if name.startswith("_") and not name.startswith("__")}
    assert private == {name for names in OTHERS.values() for name in names}
    bounds = tomllib.loads((SOURCE.parents[1] / "pyproject.toml").read_text())["project"]["dependencies"]
    bounded = {re.split(r"[>=<\[]", bound)[0] for bound in bounds if "<" in bound}
    assert bounded >= {"lightning", *OTHERS} - {"multiprocessing"}


def test_python_and_torch_have_what_we_use() -> None:
    """Names that are looked up with a default would be missed by nobody else."""
    assert inspect.signature(type(forkserver._forkserver).__init__).parameters.keys() == {"self"}
    assert "current_process()._inheriting = True" in inspect.getsource(spawn)
    fused = AdamW([Parameter(torch.zeros(1))], fused=True)
    assert fused._step_supports_amp_scaling
