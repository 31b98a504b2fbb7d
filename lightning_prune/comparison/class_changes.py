"""What a variant does to single classes: an accuracy over all may hide a class that is lost."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import lightning as L

from lightning_prune._utils.trees import tree_leaves
from lightning_prune.classification.datasets import class_names
from lightning_prune.comparison.paired_statistics import paired_difference
from lightning_prune.comparison.predictions import Predictions


class ClassChange(NamedTuple):
    """The change of one class against dense, by the images of that class.

    Attributes:
        label: Index of the class, the column of the head.
        name: Where the data know it, else the index.
        images: Images of that class.
        dense: Share of them that dense is right about.
        change: Difference of the variant to that share.
        low: Lower end of the 95% interval of the change.
        high: Upper end.
    """

    label: int
    name: str
    images: int
    dense: float
    change: float
    low: float
    high: float

    @property
    def is_certain(self) -> bool:
        """Whether there are enough images to tell the change from none: the interval does not hold 0."""
        return not self.low <= 0 <= self.high

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `results.json` holds them."""
        return {**self._asdict(), "certain": self.is_certain}


def changes_by_class(dense: Predictions, variant: Predictions, names: Mapping[int, str]) -> tuple[ClassChange, ...]:
    """The change of every class with an image, the worst first.

    Args:
        dense: Of the unpruned model.
        variant: Of a variant, for the same images in the same order, with the same labels.
        names: Index -> name of a class, where it is known.

    Example:
        >>> from lightning_prune.comparison.class_changes import changes_by_class
        >>> from lightning_prune.comparison.predictions import Predictions
        >>> labels = [0, 0, 1, 1]
        >>> found = changes_by_class(Predictions([0, 0, 1, 0], labels), Predictions([0, 1, 1, 1], labels), {0: "cat"})
        >>> [(each.name, each.images, each.change) for each in found]
        [('cat', 2, -0.5), ('1', 2, 0.5)]
    """
    pairs: dict[int, list[tuple[bool, bool]]] = {}
    for label, *right in zip(dense.labels, dense.correct, variant.correct, strict=True):
        pairs.setdefault(label, []).append((right[0], right[1]))
    found = []
    for index, judged in pairs.items():
        before, after = ([pair[which] for pair in judged] for which in (0, 1))
        share, change = sum(before) / len(judged), paired_difference(before, after)
        found.append(ClassChange(index, names.get(index, str(index)), len(judged), share, *change))
    return tuple(sorted(found, key=lambda each: (each.change, each.high, each.label)))  # of equals the more certain


def names_of_classes(trainer: L.Trainer, data: Any) -> dict[int, str]:
    """Index -> name of the classes of the validation data; empty where nothing knows them.

    Args:
        trainer: After a validation.
        data: The LightningDataModule, which may say its `class_names` or `classes`, or the loaders.
    """
    for attribute in ("class_names", "classes"):
        names = getattr(data, attribute, None)
        if isinstance(names, Sequence) and not isinstance(names, str) and names:
            return {index: str(name) for index, name in enumerate(names)}
    loaders = tree_leaves(getattr(trainer.val_dataloaders, "iterables", trainer.val_dataloaders))
    dataset = getattr(loaders[0], "dataset", None) if loaders else None
    while dataset is not None:
        found = class_names(dataset)
        if found:
            return found
        dataset = getattr(dataset, "dataset", None)  # of a part of another, as of `torch.utils.data.Subset`
    return {}
