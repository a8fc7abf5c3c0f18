"""Every family of timm's classifiers gives a map that is spatial, and timm's own logits."""

import pytest
import timm
import torch

from featinv_pl.errors import UserError
from featinv_pl.nets.backbone import Backbone

# One small model of each family that has one; `make torture` tries the large ones.
FAMILIES = [
    "test_vit", "test_byobnet", "test_coatnet", "convit_tiny", "test_convnext", "cpubone_nano",
    "cs3darknet_focus_s", "cspnext_tiny", "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224",
    "test_nfnet", "ese_vovnet19b_slim_dw", "test_resnet", "edgenext_xx_small", "efficientformerv2_s0",
    "test_efficientnet", "efficientvit_b0", "efficientvit_m0", "eva02_tiny_patch14_224", "fasternet_t0",
    "fastvit_t8", "mobilenetv3_small_050", "ghostnet_050", "gmlp_ti16_224", "hardcorenas_b", "hgnetv2_b0",
    "iformer_t", "inception_next_atto", "lcnetv2_small", "legacy_seresnet18", "levit_128", "test_mambaout",
    "mobilevit_xxs", "pvt_v2_b0", "repghostnet_050", "repvit_m1", "resnest14d", "resnetv2_18", "rexnet_100",
    "shvit_s1", "skresnet18", "starnet_s050", "swiftformer_xs", "test_vit_relpos", "vit_tiny_r_s16_p8_224",
]  # fmt: skip
LARGE = [
    "sequencer2d_s", "convmixer_768_32", "swinv2_tiny_window8_256", "mvitv2_tiny", "hiera_tiny_224",
    "swin_tiny_patch4_window7_224", "tnt_s_legacy_patch16_224", "nest_tiny", "volo_d1_224",
    "vit_dwee_patch16_reg1_gap_256", "twins_svt_small", "cait_xxs24_224", "selecsls42", "inception_v3",
    "lowformer_b0", "tiny_vit_5m_224", "legacy_xception", "dla34", "poolformer_s12", "gcvit_xxtiny",
    "hrnet_w18_small", "xcit_nano_12_p8_224", "visformer_tiny", "densenet121", "dpn48b",
]  # fmt: skip
# In these a corner of the image is not strongest in that corner of the map, before any training.
SCRAMBLED_UNTRAINED = {"convmixer_768_32", "hardcorenas_b", "levit_128", "tiny_vit_5m_224", "visformer_tiny"}
SMALLER = 96  # pixels, for models that take any size

# Branches of tokens on different grids; the class token alone; a map and a hidden state.
WITHOUT_A_MAP = ["crossvit_tiny_240", "pit_ti_224", "efficientvim_m1"]


@pytest.mark.parametrize("name", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)])
def test_map_is_spatial_and_logits_are_timms(name: str) -> None:
    fixed = timm.get_pretrained_cfg(name).fixed_input_size
    backbone = Backbone(name, "random", input_size=None if fixed else 160 if name == "inception_v3" else SMALLER)
    height, width = backbone.input_size
    images = (torch.rand(1, 3, height, width) * 2 - 1).repeat(2, 1, 1, 1)
    images[1, :, : height // 4, : width // 4] = torch.rand(3, height // 4, width // 4) * 2 - 1
    features, logits = backbone(images)
    assert features.shape[1:] == backbone.feature_shape
    assert min(backbone.feature_shape[1:]) > 1
    with torch.no_grad():
        expected = backbone.model(backbone.transform(images))
    if not backbone.classifies:
        expected = expected[:, :0]  # an embedding
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)

    if name not in SCRAMBLED_UNTRAINED:
        difference = (features[0] - features[1]).norm(dim=0)
        row, column = divmod(int(difference.argmax()), difference.shape[1])
        assert row < difference.shape[0] / 2
        assert column < difference.shape[1] / 2


@pytest.mark.parametrize("name", WITHOUT_A_MAP)
def test_refuses_what_gives_no_map(name: str) -> None:
    with pytest.raises(UserError, match=f"`backbone`: the penultimate layer of '{name}' does not return a spatial map"):
        Backbone(name, "random")
