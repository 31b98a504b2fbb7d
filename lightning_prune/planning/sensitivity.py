"""Sensitivity of each block: KL divergence from the dense outputs when only that block prunes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_prune._utils.progress import OnStep
from lightning_prune.errors import DataError
from lightning_prune.patching import PatchHandle, VisionTransformer
from lightning_prune.reduction import Reduction
from lightning_prune.runtimes.torch_runtime import force_eager
from lightning_prune.schedule import Schedule

Table = NDArray[np.float64]

_STEEPEST = 2.0  # power of the removed tokens by which the divergence may go on beyond the measured counts
_NOTHING = 1e-9  # nats: less is taken for this, since logarithms are interpolated


def step_costs(counts: Sequence[int], divergence: Table, levels: Sequence[int]) -> Table:
    """(levels, levels) nats that a block loses by going from one count (rows) to another (columns); 0 where none goes.

    Only steps from N were measured. From fewer tokens there are two estimates: a step costs what its two counts differ
    by when they are reached from N, or what the same share of N costs, and more the fewer tokens stand for the image.
    The first is too high for methods whose reach is a share (ToMe at its capacity merges tokens that are not alike,
    whatever their number), the second too low for those that drop ever better tokens. Their geometric mean orders
    random schedules best of what was tried.

    Args:
        counts: Measured, ascending, N last.
        divergence: (counts,) of each from N; 0 at N.
        levels: Token counts, ascending, N last.

    Example:
        >>> import numpy as np
        >>> from lightning_prune.planning.sensitivity import step_costs
        >>> step_costs([50, 100], np.array([0.4, 0.0]), [25, 50, 100])[2].round(2).tolist()
        [0.6, 0.4, 0.0]
    """
    places = np.array(levels, dtype=float)
    n = places[-1]
    alone = divergence_at(counts, divergence, places)
    difference = np.maximum(alone[None, :] - alone[:, None], 0.0)
    entering, leaving = places[:, None], np.minimum(places[None, :], places[:, None])
    share = divergence_at(counts, divergence, n * leaving / entering) * n / entering
    return np.sqrt(difference * share)


def divergence_at(counts: Sequence[int], divergence: Table, wanted: Table) -> Table:
    """The divergence at other counts than the measured ones; it never falls when more tokens go.

    Between measured counts its logarithm is straight. Of fewer tokens than were ever removed it is proportional to
    their number; of more it follows the power of that number that the last two counts do, at most the square.

    Args:
        counts: Measured, ascending, N last; at least one besides N.
        divergence: (counts,) of each; 0 at N.
        wanted: Any shape, counts up to N.
    """
    removed = counts[-1] - np.array(counts[:-1], dtype=float)[::-1]  # ascending, without dense
    logs = np.log(np.maximum(np.maximum.accumulate(divergence[:-1][::-1]), _NOTHING))
    gone = np.maximum(counts[-1] - wanted, 0.0)
    small = np.exp(logs[0]) * gone / removed[0]
    power = (logs[-1] - logs[-2]) / np.log(removed[-1] / removed[-2]) if len(logs) > 1 else 1.0
    large = np.exp(logs[-1]) * (np.maximum(gone, removed[-1]) / removed[-1]) ** min(power, _STEEPEST)
    inside = np.exp(np.interp(gone, removed, logs))
    return np.where(gone < removed[0], small, np.where(gone > removed[-1], large, inside))


Forward = Callable[..., Any]


@contextmanager
def recorded(blocks: Sequence[nn.Module]) -> Iterator[list[Any]]:
    """What the `forward` of each block returns in a pass, before any hook of a user sees it.

    Args:
        blocks: Whose outputs are wanted.

    Yields:
        One output a block, each a copy: a later block may work on its input in place.
    """
    passed: list[Any] = [None] * len(blocks)

    def recording(index: int, forward: Forward) -> Forward:
        def run(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            passed[index] = _copied(output)
            return output

        return run

    with _instead(blocks, [recording(index, block.forward) for index, block in enumerate(blocks)]):
        yield passed


@contextmanager
def replayed(blocks: Sequence[nn.Module], passed: Sequence[Any]) -> Iterator[None]:
    """Passes in which blocks return what they returned before, without computing it; their hooks run as ever.

    Args:
        blocks: Those that are skipped.
        passed: As `recorded` yields them; left as they are by whatever works on them in place.
    """
    with _instead(blocks, [lambda *_, _kept=kept, **__: _copied(_kept) for kept in passed[: len(blocks)]]):
        yield


@contextmanager
def _instead(blocks: Sequence[nn.Module], forwards: Sequence[Forward]) -> Iterator[None]:
    """Other functions in place of the blocks' own `forward`, which may be one that the user has put there."""
    own = [vars(block).get("forward") for block in blocks]
    for block, forward in zip(blocks, forwards, strict=True):
        vars(block)["forward"] = forward
    try:
        yield
    finally:
        for block, before in zip(blocks, own, strict=True):
            vars(block).pop("forward", None)
            if before is not None:
                vars(block)["forward"] = before


def _copied(output: Any) -> Any:
    """The same with tensors of its own, whatever containers of the usual kinds they are in."""
    if isinstance(output, Tensor):
        return output.clone()
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(*map(_copied, output))
    if isinstance(output, tuple | list):
        return type(output)(map(_copied, output))
    if isinstance(output, dict):
        return type(output)({key: _copied(value) for key, value in output.items()})
    return output


class Sensitivity:
    """KL divergence of the pruned outputs from the dense ones when one block alone reduces, in nats an image.

    Measured for some counts of every block that is asked for, from one dense pass a batch: what enters a block is kept,
    and every count of it starts from there. Images come batch by batch, so that the time can be limited; the table is
    the mean over those that were seen.

    Args:
        transformer: The Vision Transformer, dense, in evaluation mode.
        reduction: The method.
        blocks: Which blocks.
        counts: Tokens that leave the block, each of those that the method can leave there.
        tokens: N.

    Attributes:
        blocks: Which blocks, ascending.
        counts: Which counts, ascending, N last.
        images: How many images were seen.

    Example:
        >>> import timm
        >>> import torch
        >>> from lightning_prune.patching import find_vision_transformer
        >>> from lightning_prune.planning.sensitivity import Sensitivity
        >>> from lightning_prune.reduction import TopK
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=2).eval()
        >>> found = Sensitivity(find_vision_transformer(model), TopK(), blocks=[0, 1], counts=[50, 100], tokens=197)
        >>> found.add(torch.randn(2, 3, 224, 224))
        >>> found.table.shape, found.images
        ((2, 3), 2)
    """

    def __init__(
        self,
        transformer: VisionTransformer,
        reduction: Reduction,
        blocks: Sequence[int],
        counts: Sequence[int],
        tokens: int,
    ) -> None:
        self._transformer, self._reduction, self._n = transformer, reduction, tokens
        least = tokens - reduction.max_removed(tokens, transformer.prefix_tokens)
        self.blocks = sorted(blocks)
        self.counts = sorted({count for count in counts if least <= count < tokens} | {tokens})
        self.images = 0
        self._sum = np.zeros((len(self.blocks), len(self.counts)))

    @property
    def table(self) -> Table:
        """(blocks, counts) mean KL divergence; the last column, dense, is 0."""
        return self._sum / max(self.images, 1)

    def add(self, images: Tensor, tick: OnStep = lambda: None) -> None:
        """Measures a batch.

        Args:
            images: (B, channels, height, width) on the device, in the precision that the transformer takes.
            tick: Called after every pass.

        Raises:
            DataError: If the outputs are not finite.
        """
        root, family = self._transformer.root, self._transformer.family
        with torch.no_grad(), force_eager():  # also where the model is compiled: each count runs a few times only
            with recorded(self._transformer.blocks) as passed:
                dense = family.output(root.forward(images)).cpu().double()
            tick()
            found = np.zeros_like(self._sum)
            for row, block in enumerate(self.blocks):
                nothing = Schedule([0] * self._transformer.depth)
                with (
                    replayed(self._transformer.blocks[:block], passed),
                    PatchHandle(self._transformer, self._reduction, nothing) as handle,
                ):
                    for column, count in enumerate(self.counts[:-1]):
                        handle.update(Schedule.single(self._transformer.depth, block, self._n - count))
                        pruned = family.output(root.forward(images)).cpu().double()
                        found[row, column] = _divergence(dense, pruned, self._transformer.classes)
                        tick()
        if not np.isfinite(found).all():
            raise DataError(f"The model's outputs are not finite for some of {len(images)} calibration images.")
        self._sum += found
        self.images += len(images)

    def costs(self, levels: Sequence[int], depth: int, max_removed: Callable[[int], int]) -> Table:
        """(depth, levels, levels) what going from one count to another costs at each block, for the programme.

        See `lightning_prune.planning.sensitivity`. Costs add up over the blocks.

        Args:
            levels: Token counts, ascending, N last.
            depth: Blocks; those that were not measured never reduce.
            max_removed: The most tokens that the method can remove of so many.
        """
        removed = np.array(levels)[:, None] - np.array(levels)[None, :]  # entering down the rows, leaving along columns
        room = np.array([max_removed(int(count)) for count in levels])
        stay = np.where(removed == 0, 0.0, np.inf)  # where nothing is removed nothing is lost
        found = np.repeat(stay[None], depth, axis=0)
        if len(self.counts) == 1:  # the method can remove nothing here
            return found
        allowed = (removed > 0) & (removed <= room[:, None])
        for row, block in enumerate(self.blocks):
            found[block] = np.where(allowed, step_costs(self.counts, self.table[row], levels), stay)
        return found


def _divergence(dense: Tensor, pruned: Tensor, classes: int) -> float:
    """KL(dense || pruned) of logits, summed over the images; of features, half their squared distance, relative."""
    if classes:
        return float(F.kl_div(pruned.log_softmax(-1), dense.log_softmax(-1), reduction="sum", log_target=True))
    dense, pruned = dense.flatten(1), pruned.flatten(1)
    return float(((dense - pruned).square().sum(1) / dense.square().sum(1).clamp_min(1e-12)).sum() / 2)
