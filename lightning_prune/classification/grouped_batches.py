"""Batches that say the group of each image, and the accuracy of each group of a run."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_prune._utils.batch_keys import GROUP_KEYS, IMAGE_KEYS, LABEL_KEYS
from lightning_prune._utils.trees import tree_leaves
from lightning_prune.errors import DataError
from lightning_prune.metrics import GroupAccuracy


class GroupedBatch(NamedTuple):
    """A batch in its parts.

    Attributes:
        pair: What remains without groups: [images, labels] where the batch is a mapping that has both or has three
            parts, [images] of a mapping without labels, else the batch as it is.
        groups: (B,) the number of the group of each image; None where the batch says nothing of groups.
    """

    pair: Any
    groups: Tensor | None


def split_groups(batch: Any) -> GroupedBatch:
    """Takes the groups out of a batch.

    Args:
        batch: (images, labels), (images, labels, groups), or a mapping with `image`, `label` and `group`.

    Example:
        >>> import torch
        >>> from lightning_prune.classification.grouped_batches import split_groups
        >>> images, labels = torch.zeros(2, 3, 8, 8), torch.tensor([5, 7])
        >>> split_groups({"image": images, "label": labels, "group": torch.tensor([0, 1])}).groups
        tensor([0, 1])
    """
    if isinstance(batch, Mapping):
        images, labels, groups = (_first(batch, names) for names in (IMAGE_KEYS, LABEL_KEYS, GROUP_KEYS))
        if images is None:
            return GroupedBatch(batch, groups)
        return GroupedBatch([images] if labels is None else [images, labels], groups)
    if isinstance(batch, list | tuple) and len(batch) == 3:
        return GroupedBatch(list(batch[:2]), batch[2])
    return GroupedBatch(batch, None)


def names_of_groups(loaders: Any) -> list[tuple[str, ...] | None]:
    """The groups of the images of each loader: the `group_names` of its dataset, or of that in a subset; None without.

    Args:
        loaders: The loaders of a loop, in any nesting.
    """
    found: list[tuple[str, ...] | None] = []
    for loader in tree_leaves(getattr(loaders, "iterables", loaders)):
        dataset = getattr(loader, "dataset", loader)
        while getattr(dataset, "group_names", None) is None and getattr(dataset, "dataset", None) is not None:
            dataset = dataset.dataset  # of a subset
        names = getattr(dataset, "group_names", None)
        found.append(tuple(names) if names else None)
    return found


class GroupReport(nn.Module):
    """The accuracy of each group of images of a run, and of the worst of them.

    Args:
        names: What the groups are called, in the order of their numbers in a batch.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.accuracy = GroupAccuracy(len(self.names))

    def reset(self) -> None:
        """Forgets all images."""
        self.accuracy.reset()

    def update(self, logits: Tensor, labels: Tensor, groups: Any, count: int, where: str) -> None:
        """Adds a batch.

        Args:
            logits: (B, classes).
            labels: (B,).
            groups: (B,) the group of each image; None where the batch has none, which is an error.
            count: How many images count, from the first; the others repeat images of another process.
            where: Name of the batch in error messages.

        Raises:
            DataError: If the groups are no integers (B,), or numbers that are no groups.
        """
        if groups is None:
            raise DataError(
                f"{where.capitalize()} must have groups, as names of groups were given: a mapping with `image`, "
                "`label` and `group`, or (images, labels, groups)."
            )
        if not isinstance(groups, Tensor) or groups.is_floating_point() or groups.shape != labels.shape:
            got = tuple(groups.shape) if isinstance(groups, Tensor) else type(groups).__name__
            raise DataError(f"Groups of {where} must be integers {tuple(labels.shape)}, got {got}.")
        if count:
            self.accuracy.update((logits.argmax(dim=1) == labels)[:count], groups[:count])

    def compute(self) -> dict[str, Tensor]:
        """The figures by name: `group_NAME` of each, `worst_group`, and how many images that has.

        A group without images is NaN, and never the worst; without any image there are no figures of the worst.
        """
        with self.accuracy.sync_context():  # of all processes, as `compute` does
            images = self.accuracy.total.clone()
        found = self.accuracy.compute()
        figures = {f"group_{name}": accuracy for name, accuracy in zip(self.names, found, strict=True)}
        if not found.isnan().all():
            worst = found.nan_to_num(nan=2.0).argmin()
            figures |= {"worst_group": found[worst], "worst_group_images": images[worst].float()}
        return figures


def _first(batch: Mapping[Any, Any], names: Sequence[str]) -> Any:
    return next((batch[name] for name in names if name in batch), None)
