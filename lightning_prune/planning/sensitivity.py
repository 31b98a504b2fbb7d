"""Sensitivity of each block: divergence from the dense outputs when only that block reduces.

From it follows what a step from one token count to another costs at a block, which the dynamic programme adds up.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_prune._utils.progress import OnStep, note_progress
from lightning_prune.errors import DataError
from lightning_prune.patching import PatchHandle, VisionTransformer
from lightning_prune.planning.activation_cache import recorded, replayed
from lightning_prune.profiling.output_kinds import OUTPUT_KINDS, choose_proxy
from lightning_prune.reduction import Reduction
from lightning_prune.runtimes.in_place import force_eager
from lightning_prune.schedule import Schedule

Table = NDArray[np.float64]


@dataclass(frozen=True)
class SensitivityTuning:
    """Constants of the extrapolation of measured sensitivities, and of what tells how far they vary.

    Attributes:
        group_images: Images that are left out together, at least, for a standard error.
        max_groups: Groups of them at most: further images join the groups in turn.
        max_power: Power of the number of removed tokens by which the divergence may grow beyond the measured counts.
        min_divergence_nats: A smaller divergence is taken for this, because logarithms are interpolated.
    """

    group_images: int = 4
    max_groups: int = 16
    max_power: float = 2.0
    min_divergence_nats: float = 1e-9


TUNING = SensitivityTuning()


class Sensitivity:
    """Divergence of the pruned outputs from the dense ones when only one block reduces, per image.

    KL divergence in nats for classes and tags; half a squared relative distance for numbers and features.

    Measured at some counts of each block, with one dense pass per batch: every other pass starts from the recorded
    input of the block, and several methods can share the dense pass. Images are added batch by batch, so that the time
    can be limited; the table is their mean.

    Args:
        transformer: The Vision Transformer, dense, in evaluation mode.
        reduction: The method.
        blocks: Blocks to measure.
        counts: Tokens that leave the block; counts that the method cannot reach are left out, or replaced by the
            nearest possible ones (`Reduction.possible_counts`).
        tokens: N.
        proxy: Says how outputs are compared; see `lightning_prune.profiling.output_kinds.choose_proxy`.
        grid: Rows and columns of the patches; None if they are not known.
        tail: As of `lightning_prune.patch`. With the exact tail nothing is lost by what the last block removes.

    Attributes:
        blocks: The measured blocks, ascending.
        counts: The measured counts, ascending, N last.
        images: Number of images so far.

    Example:
        >>> import timm
        >>> import torch
        >>> from lightning_prune.patching import find_vision_transformer
        >>> from lightning_prune.planning.sensitivity import Sensitivity
        >>> from lightning_prune.reduction import TopK
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=2).eval()
        >>> measured = Sensitivity(find_vision_transformer(model), TopK(), blocks=[0, 1], counts=[50, 100], tokens=197)
        >>> measured.add(torch.randn(2, 3, 224, 224))
        >>> measured.table.shape, measured.images
        ((2, 3), 2)
    """

    def __init__(
        self,
        transformer: VisionTransformer,
        reduction: Reduction,
        blocks: Sequence[int],
        counts: Sequence[int],
        tokens: int,
        proxy: str = "auto",
        grid: tuple[int, int] | None = None,
        tail: bool | None = None,
    ) -> None:
        self._transformer, self._reduction, self._n, self._tail = transformer, reduction, tokens, tail
        prefix = transformer.num_prefix_tokens
        fewest = tokens - reduction.max_removed(tokens, prefix)
        self.blocks = sorted(blocks)
        cuts = {reduction.nearest_removed(tokens - c, tokens, prefix, grid) for c in counts if fewest <= c < tokens}
        self.counts = sorted({tokens - cut for cut in cuts} | {tokens})
        possible = reduction.possible_counts(tokens, prefix, grid)
        self._possible = None if possible is None else {tokens, *possible}
        self.images = 0
        self._kind = OUTPUT_KINDS[choose_proxy(transformer.root, transformer, proxy)]
        self._scale: Tensor | None = None  # typical size of each output, in the first batch
        self._sum = np.zeros((len(self.blocks), len(self.counts)))
        self._size = 0.0  # of all images
        self._groups: list[tuple[float, Table]] = []  # size and sum of each
        self._parts = 0  # of batches, which are in groups

    @property
    def table(self) -> Table:
        """(blocks, counts) mean divergence; the last column, dense, is 0."""
        return self._sum / (self._size or 1.0)

    def add(
        self,
        images: Tensor,
        on_step: OnStep = lambda: None,
        dense: "DensePass | None" = None,
        sizes: Tensor | None = None,
    ) -> None:
        """Measures a batch.

        Args:
            images: (B, C, H, W) on the device, in the dtype of the transformer.
            on_step: Called after every pass.
            dense: The dense pass over these images, which does for all methods; it is made if None.
            sizes: (B,) what each image counts for, if not all are expected to diverge alike: something to which their
                divergence is proportional, and which is 1 in the mean over all images. The mean divergence is then
                estimated by the ratio of the sums (Cochran, Sampling Techniques, 1977, chapter 6). 1 if None.

        Raises:
            DataError: If the outputs are not finite.
        """
        if dense is None:
            dense = dense_pass(self._transformer, images)
            on_step()
        if self._scale is None:
            self._scale = _typical_spread(dense.outputs)
        starts = range(0, len(images), TUNING.group_images)
        parts = [slice(start, start + TUNING.group_images) for start in starts]
        found = np.zeros((len(parts), *self._sum.shape))
        with torch.no_grad(), force_eager():  # without compiling: each count runs a few times only
            for row, block in enumerate(self.blocks):
                nothing = Schedule([0] * self._transformer.depth)
                with (
                    replayed(self._transformer.blocks[:block], dense.of_blocks),
                    PatchHandle(self._transformer, self._reduction, nothing, tail=self._tail) as handle,
                ):
                    for column, count in enumerate(self.counts[:-1]):
                        handle.update(Schedule.single(self._transformer.depth, block, self._n - count))
                        pruned = self._transformer.output(self._transformer.run_eagerly(images)).cpu().double()
                        found[:, row, column] = [
                            self._kind.divergence(dense.outputs[part], pruned[part], self._scale) for part in parts
                        ]
                        place = f"block {row + 1} of {len(self.blocks)}"
                        note_progress(f"{self._reduction.name}, {place}, after {self.images} images")
                        on_step()
        if not np.isfinite(found).all():
            raise DataError(f"The model's outputs are not finite for some of {len(images)} calibration images.")
        counted = torch.ones(len(images)) if sizes is None else sizes
        for part, own in zip(parts, found, strict=True):
            size = float(counted[part].sum())
            self._sum += own
            self._size += size
            group = self._parts % TUNING.max_groups
            self._parts += 1
            if group == len(self._groups):
                self._groups.append((size, own))
            else:
                self._groups[group] = self._groups[group][0] + size, self._groups[group][1] + own
        self.images += len(images)

    def take(self, table: Table, images: int) -> None:
        """Takes what was measured before, in place of measuring it.

        Args:
            table: (blocks, counts) mean divergence.
            images: Number of images.
        """
        self._sum, self._size, self.images = np.array(table, dtype=float) * images, float(images), images
        self._groups, self._parts = [], 0

    def without_groups(self) -> list[Table]:
        """The table without each group of images in turn; none where there are no two that were measured here."""
        if len(self._groups) < 2:
            return []
        return [(self._sum - found) / (self._size - size) for size, found in self._groups]

    def costs(
        self, levels: Sequence[int], depth: int, max_removed: Callable[[int], int], table: Table | None = None
    ) -> Table:
        """(depth, levels, levels) cost of going from one count to another at each block, for the dynamic programme.

        Args:
            levels: Token counts, ascending, N last.
            depth: Number of blocks; those that were not measured never reduce.
            max_removed: The largest number of tokens that the method can remove from a given number.
            table: (blocks, counts) divergence; that of all images if None.
        """
        table = self.table if table is None else table
        removed = np.array(levels)[:, None] - np.array(levels)[None, :]  # entering down the rows, leaving along columns
        largest = np.array([max_removed(int(count)) for count in levels])
        unchanged = np.where(removed == 0, 0.0, np.inf)  # removing nothing costs nothing
        costs = np.repeat(unchanged[None], depth, axis=0)
        if len(self.counts) == 1:  # the method can remove nothing
            return costs
        allowed = (removed > 0) & (removed <= largest[:, None])
        if self._possible is not None:  # of N tokens, as the method reduces once
            allowed &= np.array([count in self._possible for count in levels])[None, :]
        for row, block in enumerate(self.blocks):
            costs[block] = np.where(allowed, step_costs(self.counts, table[row], levels), unchanged)
        return costs


class DensePass(NamedTuple):
    """A pass of the dense model over a batch, from each of whose blocks other passes can start.

    Attributes:
        outputs: (B, K) of the model, in float64 on the CPU.
        of_blocks: The output of each block.
    """

    outputs: Tensor
    of_blocks: list[Any]


def dense_pass(transformer: VisionTransformer, images: Tensor) -> DensePass:
    """Runs the dense model on a batch and records its blocks.

    Args:
        transformer: Dense.
        images: (B, C, H, W) on the device, in the dtype of the transformer.
    """
    with torch.no_grad(), force_eager(), recorded(transformer.blocks) as of_blocks:
        outputs = transformer.output(transformer.run_eagerly(images)).cpu().double()
    return DensePass(outputs, of_blocks)


def step_costs(counts: Sequence[int], divergence: Table, levels: Sequence[int]) -> Table:
    """(levels, levels) nats lost at a block by going from one count (rows) to another (columns); 0 for no step.

    Sensitivity is measured from N tokens only. For fewer tokens, two estimates are combined by their geometric mean,
    which ranked random schedules best: the difference of the two measured divergences, and the divergence of the same
    share of N, scaled up by the share of tokens that are left. The first is too high for methods whose limit is a share
    of the tokens (ToMe), the second too low for methods that drop ever better tokens. It holds for cuts in images that
    were made smaller (`resize`), too: the divergence of 144 such schedules of a CIFAR-10 ViT was 0.96 times the sum of
    both, on 48 images (standard deviation 16%; 1.03 times for ToMe, 1.00 for POMT, 0.86 for top-k).

    Args:
        counts: Measured counts, ascending, N last.
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
    from_n = divergence_at(counts, divergence, places)
    difference = np.maximum(from_n[None, :] - from_n[:, None], 0.0)
    entering, leaving = places[:, None], np.minimum(places[None, :], places[:, None])
    share = divergence_at(counts, divergence, n * leaving / entering) * n / entering
    return np.sqrt(difference * share)


def divergence_at(counts: Sequence[int], divergence: Table, wanted: Table) -> Table:
    """The divergence at any counts; it never falls when more tokens are removed.

    Its logarithm is linear between measured counts. Below the smallest measured number of removed tokens it is
    proportional to that number; above the largest it follows the power law of the last two counts, at most squared.

    Args:
        counts: Measured counts, ascending, N last; at least one other than N.
        divergence: (counts,) of each; 0 at N.
        wanted: Counts up to N, of any shape.
    """
    removed = counts[-1] - np.array(counts[:-1], dtype=float)[::-1]  # ascending, without dense
    logs = np.log(np.maximum(np.maximum.accumulate(divergence[:-1][::-1]), TUNING.min_divergence_nats))
    gone = np.maximum(counts[-1] - wanted, 0.0)
    below = np.exp(logs[0]) * gone / removed[0]
    power = (logs[-1] - logs[-2]) / np.log(removed[-1] / removed[-2]) if len(logs) > 1 else 1.0
    above = np.exp(logs[-1]) * (np.maximum(gone, removed[-1]) / removed[-1]) ** min(power, TUNING.max_power)
    between = np.exp(np.interp(gone, removed, logs))
    return np.where(gone < removed[0], below, np.where(gone > removed[-1], above, between))


def _typical_spread(outputs: Tensor) -> Tensor:
    """(K,) standard deviation of each output over the images; the size of the output for a single image."""
    size = outputs.square().mean(0).sqrt()
    spread = outputs.std(0) if len(outputs) > 1 else size
    return spread.clamp_min(1e-6 * float(size.max()) + 1e-12)
