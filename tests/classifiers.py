"""Tiny classifiers of torchvision, of transformers and of one's own."""

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torchvision.transforms import CenterCrop, Compose, Normalize, Resize, ToTensor

TINY = "shufflenet_v2_x0_5"  # the smallest of torchvision


class Net(nn.Module):
    """A classifier as people write them."""

    class_names = ("cat", "dog", "owl")
    transform = Compose([Resize(36), CenterCrop(32), ToTensor(), Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))])

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Conv2d(8, 6, 2, 2))
        self.head = nn.Linear(6, classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.net(images).relu().mean((2, 3)))
        return logits


TOWER: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VIT = {**TOWER, "image_size": 32, "patch_size": 8}
SQUARE, SHORTER = {"height": 32, "width": 32}, {"shortest_edge": 40}


def of_transformers(kind: str) -> tuple[Any, Any]:
    """A tiny model and its image processor."""
    t: Any = transformers
    square = t.ViTImageProcessor(size=SQUARE)
    if kind == "vit":
        return t.ViTForImageClassification(t.ViTConfig(**VIT, id2label={0: "cat", 1: "dog", 2: "owl"})), square
    if kind == "resnet":
        config = t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], num_labels=5)
        return t.ResNetForImageClassification(config), t.ConvNextImageProcessor(size=SHORTER, crop_pct=0.9)
    if kind == "swin":
        sizes = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]}
        return t.SwinForImageClassification(t.SwinConfig(**sizes, window_size=4)), square
    if kind == "dinov2":
        crop = {"height": 28, "width": 28}
        config = t.Dinov2Config(**{**VIT, "image_size": 28, "patch_size": 7})
        return t.Dinov2Model(config), t.BitImageProcessor(size=SHORTER, crop_size=crop)
    if kind == "siglip":
        return t.SiglipVisionModel(t.SiglipVisionConfig(**VIT)), t.SiglipImageProcessor(size=SQUARE)
    if kind == "aimv2":
        return t.Aimv2VisionModel(t.Aimv2VisionConfig(**VIT)), square
    if kind == "vit without a pooler":
        return t.ViTModel(t.ViTConfig(**VIT), add_pooling_layer=False), square
    text = t.CLIPTextConfig(**TOWER, vocab_size=100, bos_token_id=0, eos_token_id=1)
    clip = t.CLIPConfig(text_config=text.to_dict(), vision_config=t.CLIPVisionConfig(**VIT).to_dict())
    return t.CLIPModel(clip), t.CLIPImageProcessor(size=SHORTER, crop_size=SQUARE)


def saved(kind: str) -> tuple[Any, Any]:
    """Those, in the folder `model`."""
    model, processor = of_transformers(kind)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data += 0.05 * torch.rand_like(tensor)
    model.save_pretrained("model")
    processor.save_pretrained("model")
    return model.eval(), processor
