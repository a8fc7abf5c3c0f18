"""The names of a classifier's classes, by which labels are found."""

from dataclasses import dataclass
from functools import cache
from typing import Any, Self

from timm.data import ImageNetInfo, infer_imagenet_subset

from featinv_pl.errors import UserError

NO_LABEL = -1
IMAGENET = 1000


@dataclass(frozen=True)
class Classes:
    """The classes of a classifier.

    Attributes:
        labels: The place of each class among the logits, by name. Empty if the names are not known.
        numbered: Names that are numbers below it, such as the folders of ImageNet-V2, are labels themselves.
    """

    labels: dict[str, int]
    numbered: int

    @classmethod
    def of(cls, model: Any, num_classes: int) -> Self:
        """The classes of a timm model with as many logits.

        Names are those of `label_names` in its configuration, as fitting a `Classifier` writes them. Otherwise they
        are the wnids that timm knows for heads of ImageNet-1k, 12k, 21k and 22k, told by the number of classes.
        """
        names = model.pretrained_cfg.get("label_names")
        if names:
            return cls(_checked(names, num_classes), 0)
        subset = infer_imagenet_subset({"num_classes": num_classes})
        if subset is None or not model.num_classes:
            return cls({}, num_classes)
        return cls(_wnids(subset), num_classes if num_classes == IMAGENET else 0)

    def label(self, name: str) -> int:
        """The label of a class by its name; -1 for a name that is not among the classifier's."""
        if name.isdecimal() and int(name) < self.numbered:
            return int(name)
        return self.labels.get(name, NO_LABEL)


@cache
def _wnids(subset: str) -> dict[str, int]:
    return {wnid: label for label, wnid in enumerate(ImageNetInfo(subset).label_names())}


def _checked(names: Any, num_classes: int) -> dict[str, int]:
    named = {name: label for label, name in enumerate(names)} if isinstance(names, list | tuple) else {}
    if len(named) != num_classes or not all(isinstance(name, str) for name in named):
        raise UserError(
            f"`backbone`: label_names in config.json are not {num_classes} different names, one for each class. "
            "Correct them, or fit the Classifier again."
        )
    return named
