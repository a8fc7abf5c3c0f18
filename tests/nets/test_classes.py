"""Labels by the names of a classifier's classes, against timm's own files."""

import json
from importlib.resources import files
from pathlib import Path

import pytest
import timm
from timm.models import save_for_hf

from featinv_pl.errors import UserError
from featinv_pl.nets.backbone import Backbone
from featinv_pl.nets.classes import Classes

SYNSETS = {
    1000: "imagenet",
    11221: "imagenet21k_miil",
    11821: "imagenet12k",
    21841: "imagenet22k",
    21842: "imagenet22k_ms",
    21843: "imagenet21k_goog",
}


def head(num_classes: int) -> Classes:
    return Classes.of(timm.create_model("test_resnet", channels=(8, 8, 8, 8), num_classes=num_classes), num_classes)


@pytest.mark.parametrize("num_classes", SYNSETS)
def test_wnids_are_labelled_in_the_order_of_the_head(num_classes: int) -> None:
    lines = files("timm.data").joinpath(f"_info/{SYNSETS[num_classes]}_synsets.txt").read_text().splitlines()
    assert len(lines) == num_classes
    classes = head(num_classes)
    for label in (0, 217, num_classes - 1):
        assert classes.label(lines[label]) == label
    assert classes.label("n99999999") == classes.label("cat") == -1
    assert classes.label("217") == (217 if num_classes == 1000 else -1)  # the folders of ImageNet-V2
    assert classes.label(str(num_classes)) == -1


def test_other_heads_say_nothing_of_wnids() -> None:
    assert head(100).label("n01440764") == -1
    assert head(10).label("7") == 7


def test_names_of_a_configuration_decide(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", channels=(8, 8, 8, 8), num_classes=3)
    save_for_hf(model, str(tmp_path), {"label_names": ["n02102040", "owl", "0"]}, safe_serialization=True)
    backbone = Backbone(str(tmp_path), input_size=32)
    names = ("n02102040", "owl", "0", "1", "n01440764")
    assert [backbone.classes.label(name) for name in names] == [0, 1, 2, -1, -1]
    backbone.save_pretrained(tmp_path / "again")
    assert Backbone(str(tmp_path / "again")).classes == backbone.classes
    config = json.loads((tmp_path / "config.json").read_text())
    for wrong in (["a", "b"], ["a", "a", "b"], [1, 2, 3], "abc"):
        (tmp_path / "config.json").write_text(json.dumps({**config, "label_names": wrong}))
        with pytest.raises(UserError, match=r"label_names in config\.json are not 3 different names"):
            Backbone(str(tmp_path), input_size=32)
