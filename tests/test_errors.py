"""Messages name an argument; the command names the option that sets it."""

import pytest

from featinv_pl.__main__ import main
from featinv_pl.errors import UserError, spelled
from featinv_pl.runtime.averaging import MovingAverage

OPTIONS = [
    *("--model.steps", "--model.sampler.steps", "--data.train", "--data.test.imagenet-a"),
    *("--trainer.a.lr", "--trainer.b.lr", "--seed"),
]


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("seed", "--seed"),
        ("train", "--data.train"),
        ("data.train", "--data.train"),
        ("steps", "--model.steps"),  # the option on top, rather than one of a group
        ("sampler.steps", "--model.sampler.steps"),
        ("lr", "`lr`"),  # of two
        ("data.test.imagenet-a", "--data.test.imagenet-a"),
        ("rain", "`rain`"),
        ("featinv-pl export", "`featinv-pl export`"),
    ],
)
def test_names_in_backticks_become_options(name: str, option: str) -> None:
    assert spelled(f"`{name}` must be at least 1.", OPTIONS) == f"{option} must be at least 1."


def test_the_command_spells_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="`decay` must lie between 0 and 1, and is 2"):
        MovingAverage(2.0)
    model = ["--model=Classifier", "--model.model=test_resnet", "--model.num_classes=10", "--model.image_size=32"]
    with pytest.raises(SystemExit):
        main(["fit", *model, "--data=DigitsData", "--trainer.callbacks+=MovingAverage", "--trainer.callbacks.decay=2"])
    assert capsys.readouterr().err == (
        "featinv-pl: error: --trainer.callbacks.decay must lie between 0 and 1, and is 2.0.\n"
    )
