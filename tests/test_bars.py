"""What tells of a wait does not fill logs."""

import re

import pytest
from tqdm import tqdm

from featinv_pl.bars import style, told
from interrupts import Capture


def test_a_log_gets_a_line_in_ten_seconds_and_none_of_what_is_quick(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    now = 0.0
    monkeypatch.setattr("tqdm.std.time", lambda: now)
    for seconds, lines in ((65, ["10", "20", "30", "40", "50", "60", "65"]), (9, [])):
        for _ in tqdm(range(seconds), **style("work", "step")):
            now += 1
        assert re.findall(r"(\d+)/\d+ \[", capsys.readouterr().err) == lines
    told("featinv-pl steer", "loading")
    assert not capsys.readouterr().err


def test_a_terminal_is_told_at_once(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    told("featinv-pl steer", "loading")
    assert capsys.readouterr().err == "featinv-pl steer: loading ...\n"
    assert style("work", "step")["mininterval"] < 1
