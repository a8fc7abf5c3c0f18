"""Training that was interrupted sees exactly the samples that it has not seen, and ends with the same weights."""

import json
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer

from featinv_pl.__main__ import main
from interrupts import Capture, assert_same, weights
from test_cli import refused
from tiny import extraction, inversion, write

STEPS = 10  # of epochs of four


class Recorder(Callback):
    """Appends the keys of each batch that is trained on."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        with Path(f"seen-{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps([trainer.global_step, batch["key"]]) + "\n")


@pytest.fixture
def config(classifier_folder: Path, prior_folder: Path) -> str:
    extract = extraction(classifier_folder, prior_folder, ["val"])
    extract["trainer"] |= {"limit_predict_batches": 11, "enable_progress_bar": False}
    extract["trainer"]["callbacks"][0]["init_args"]["shard_size"] = 6
    extract["data"]["init_args"]["batch_size"] = 6
    main(["predict", "--config", write(Path("extract.yaml"), extract)])
    fit = inversion(classifier_folder, prior_folder)
    fit["trainer"] |= {
        "max_steps": STEPS,
        "limit_val_batches": 0,
        "enable_progress_bar": False,
        "callbacks": [
            {
                "class_path": "ModelCheckpoint",
                "init_args": {"filename": "{step}", "every_n_train_steps": 1, "save_top_k": -1},
            },
            {"class_path": "MovingAverage", "init_args": {"decay": 0.5}},
            {"class_path": f"{__name__}.Recorder"},
        ],
    }
    fit["data"]["init_args"] = {"train": "shards/val", "batch_size": 16}
    return write(Path("fit.yaml"), fit)


def seen(rank: int = 0) -> list[Any]:
    path = Path(f"seen-{rank}.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.unlink()
    return lines


def test_training_resumes_from_any_step(config: str, capsys: Capture) -> None:
    main(["fit", "--config", config])
    complete, final = seen(), weights(f"run/step={STEPS}.ckpt", STEPS)
    assert [step for step, _ in complete] == list(range(STEPS))
    for epoch in (complete[:4], complete[4:8]):
        keys = [key for _, keys in epoch for key in keys]
        assert len(keys) == len(set(keys)) == 64
    Path("run").rename("before")
    for step in (4, 7):  # at the end of an epoch, and within one
        more = [f"--data.num_workers={step % 2}", f"--trainer.default_root_dir=from-{step}"]  # may both be others
        main(["fit", "--config", config, "--ckpt_path", f"before/step={step}.ckpt", *more])
        assert seen() == complete[step:]
        assert_same(weights(f"from-{step}/step={STEPS}.ckpt", STEPS), final)
    # What is left of an epoch depends on how it was shared out.
    other = ["fit", "--config", config, "--data.batch_size=8", "--ckpt_path"]
    refused([*other, "before/step=7.ckpt"], capsys, "batch_size: 16 in the checkpoint, 8 here")
    main([*other, "before/step=8.ckpt"])  # a whole number of epochs
    assert [step for step, _ in seen()] == [8, 9]
