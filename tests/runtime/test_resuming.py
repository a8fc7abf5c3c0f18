"""Training that was interrupted sees exactly the samples that it has not seen, and ends with the same weights."""

from pathlib import Path
from typing import Any

import pytest

from featinv_pl.__main__ import main
from interrupts import Capture, assert_same, weights
from test_cli import refused
from tiny import write
from torture.processes import SEEN, lines

STEPS = 7  # of epochs of three


@pytest.fixture
def config(settings: dict[str, Any]) -> str:
    settings["trainer"]["callbacks"][1]["init_args"] |= {
        "filename": "{step}",
        "every_n_train_steps": 1,
        "save_top_k": -1,
    }
    settings["trainer"]["callbacks"].append({"class_path": "torture.processes.Recorder"})
    settings["trainer"] |= {"max_steps": STEPS, "limit_val_batches": 0}
    return write(Path("fit.yaml"), settings)


def seen() -> list[Any]:
    path = Path(SEEN.format(0))
    found = [(step, keys) for _, step, keys in lines(path)]
    path.unlink()
    return found


def test_training_resumes_from_any_step(config: str, capsys: Capture) -> None:
    main(["fit", "--config", config])
    complete, final = seen(), weights(f"run/step={STEPS}.ckpt", STEPS)
    assert [step for step, _ in complete] == list(range(STEPS))
    for epoch in (complete[:3], complete[3:6]):
        keys = [key for _, keys in epoch for key in keys]
        assert len(keys) == len(set(keys)) == 48
    Path("run").rename("before")
    for step in (3, 5):  # at the end of an epoch, and within one
        more = [f"--data.num_workers={step // 5}", f"--trainer.default_root_dir=from-{step}"]  # may both be others
        main(["fit", "--config", config, "--ckpt_path", f"before/step={step}.ckpt", *more])
        assert seen() == complete[step:]
        assert_same(weights(f"from-{step}/step={STEPS}.ckpt", STEPS), final)
    # What is left of an epoch depends on how it was shared out.
    other = ["fit", "--config", config, "--data.batch_size=8", "--ckpt_path"]
    refused([*other, "before/step=5.ckpt"], capsys, "batch_size: 16 in the checkpoint, 8 here")
    main([*other, "before/step=6.ckpt"])  # a whole number of epochs
    assert [step for step, _ in seen()] == [6]
