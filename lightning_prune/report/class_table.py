"""The classes that lose most by each variant, for the HTML report and the terminal."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from lightning_prune._utils import formatting
from lightning_prune.report.html_table import interval_text, points
from lightning_prune.report.rows import number

SHOWN = 5
"""Classes of each variant."""
TOO_FEW = "too few images to tell"
"""What is said of a class whose interval holds 0."""


class LosingClass(NamedTuple):
    """A class that a variant is less often right about than dense.

    Attributes:
        name: The class.
        images: Images of it.
        change: In the share of right images, in [-1, 0).
        interval: The 95% interval of the change.
        is_certain: Whether the interval lies below 0.
    """

    name: str
    images: int
    change: float
    interval: tuple[float, float]
    is_certain: bool

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """Images, change, interval, and whether the images can tell the change, as a table shows them."""
        note = "" if self.is_certain else TOO_FEW
        return str(self.images), points(self.change), interval_text(self.interval), note

    @property
    def sentence(self) -> str:
        """The class in a few words."""
        note = "" if self.is_certain else f", {TOO_FEW}"
        return f"{self.name} ({formatting.points(self.change)} on {self.images} images{note})"


class VariantClasses(NamedTuple):
    """What is known of the classes of a variant.

    Attributes:
        variant: Its name.
        classes: How many classes were compared; 0 where images or right classes are not known.
        losing: The classes that lose most, the worst first.
    """

    variant: str
    classes: int
    losing: tuple[LosingClass, ...]

    @property
    def sentence(self) -> str:
        """What is shown where no class loses, or none is known."""
        return f"none of {self.classes} classes loses" if self.classes else "the classes cannot be compared"


def losing_classes(document: Mapping[str, Any]) -> list[VariantClasses]:
    """The classes that lose most by each variant.

    Args:
        document: What `compare` writes as `results.json`.

    Returns:
        Nothing where changes of classes were not asked for.

    Example:
        >>> cat = {"name": "cat", "images": 50, "change": -0.1, "low": -0.22, "high": 0.01}
        >>> [found] = losing_classes({"classes": {"tome 2x": [cat]}})
        >>> found.losing[0].sentence
        'cat (-10.00 on 50 images, too few images to tell)'
    """
    found = []
    for variant, entries in (document.get("classes") or {}).items():
        read = sorted(map(_class_of, entries), key=lambda each: each.change)  # stable: of equals the first stays so
        losing = tuple(each for each in read[:SHOWN] if each.change < 0)
        found.append(VariantClasses(str(variant), len(entries), losing))
    return found


def _class_of(entry: Mapping[str, Any]) -> LosingClass:
    change, low, high = (number(entry.get(key)) or 0.0 for key in ("change", "low", "high"))
    return LosingClass(str(entry.get("name")), int(entry.get("images") or 0), change, (low, high), high < 0)
