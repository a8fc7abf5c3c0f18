"""Tab completion, as bash asks for it."""

import subprocess
from pathlib import Path

import pytest

from featinv_pl.__main__ import main

ASK = """
source ./script
while read -r -a COMP_WORDS; do
  [[ ${COMP_WORDS[-1]} == _ ]] && COMP_WORDS[-1]=""
  COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMPREPLY=()
  _featinv_pl
  echo "${COMPREPLY[@]}"
done
"""
# Words as bash divides them; the last is completed, and _ is empty.
ANSWERS = {
    "rep": {"report"},
    "predict --data F": {"FolderData", "FeatureShards"},
    "predict --data = Fo": {"FolderData"},
    "fit --data.fold": {"--data.folder"},
    "fit --config a.yaml --trainer.max_st": {"--trainer.max_steps"},
    "fit --trainer.callbacks+ = Mov": {"MovingAverage"},
    "fit --model.optimizer = AdamW": {"AdamW"},
    "fit --model.sampler.scheduler _": {"ddim", "dpm", "unipc"},
    "reconstruct a.png --sampler.scheduler = u": {"unipc"},
    "verify _": set(),  # files, which bash adds
}


def test_bash_completes_commands_options_classes_and_values(capsys: pytest.CaptureFixture[str]) -> None:
    main(["completion"])
    Path("script").write_text(capsys.readouterr().out)
    asked = "".join(f"featinv-pl {words}\n" for words in ANSWERS)
    done = subprocess.run(["bash", "-c", ASK], input=asked, capture_output=True, text=True, check=True)
    found = [set(line.split()) for line in done.stdout.splitlines()]
    assert dict(zip(ANSWERS, found, strict=True)) == ANSWERS
