"""How much each block minds a reduction: KL divergence from the dense outputs, block by block, count by count."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_prune.compiling import eagerly
from lightning_prune.errors import DataError
from lightning_prune.patching import PatchHandle, VisionTransformer
from lightning_prune.planning.replay import recorded, replayed
from lightning_prune.planning.step_costs import Table, step_costs
from lightning_prune.progress import Ticker
from lightning_prune.reduction import Reduction
from lightning_prune.schedule import Schedule


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
        least = tokens - reduction.capacity(tokens, transformer.prefix_tokens)
        self.blocks = sorted(blocks)
        self.counts = sorted({count for count in counts if least <= count < tokens} | {tokens})
        self.images = 0
        self._sum = np.zeros((len(self.blocks), len(self.counts)))

    @property
    def table(self) -> Table:
        """(blocks, counts) mean KL divergence; the last column, dense, is 0."""
        return self._sum / max(self.images, 1)

    def add(self, images: Tensor, tick: Ticker = lambda: None) -> None:
        """Measures a batch.

        Args:
            images: (B, channels, height, width) on the device, in the precision that the transformer takes.
            tick: Called after every pass.

        Raises:
            DataError: If the outputs are not finite.
        """
        root, family = self._transformer.root, self._transformer.family
        with torch.no_grad(), eagerly():  # also where the model is compiled: each count runs a few times only
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

    def costs(self, levels: Sequence[int], depth: int, capacity: Callable[[int], int]) -> Table:
        """(depth, levels, levels) what going from one count to another costs at each block, for the programme.

        See `lightning_prune.planning.step_costs`. Costs add up over the blocks.

        Args:
            levels: Token counts, ascending, N last.
            depth: Blocks; those that were not measured never reduce.
            capacity: The most tokens that the method can remove of so many.
        """
        removed = np.array(levels)[:, None] - np.array(levels)[None, :]  # entering down the rows, leaving along columns
        room = np.array([capacity(int(count)) for count in levels])
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
