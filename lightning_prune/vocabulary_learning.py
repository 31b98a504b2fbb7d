"""Learning visual words from images that stream past: mini-batch k-means on raw normalised patches."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_prune.errors import ArgumentError, DataError
from lightning_prune.patches import cut
from lightning_prune.progress import ticking
from lightning_prune.vocabulary import Vocabulary

_STEP = 3  # patches for each word in a step of k-means, and to choose the first words from: scikit-learn's own rule
_LEAST_STEP = 1024  # patches; its own size of a mini-batch
_CHOSEN_WELL = 2048  # words; of more, k-means++ takes many minutes, and a third of the patches differ enough anyway


def learn_vocabulary(
    batches: Iterable[Tensor],
    patch_size: int,
    words: int = 1000,
    *,
    seed: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    progress: bool = True,
) -> Vocabulary:
    """Learns visual words from unlabelled images: centroids of their patches by mini-batch k-means.

    Source: arXiv 2411.15397. Images stream past; about three patches a word are kept in memory at a time. The words do
    not depend on how the images are batched. The first words are patches chosen by k-means++, at random where there are
    more than 2048 words.

    Args:
        batches: Images (B, channels, height, width) as the model sees them: resized and normalised.
        patch_size: Side of the model's patches, in pixels; a border narrower than that is left out.
        words: How many words.
        seed: Of the first words, and of those that replace words that are not used.
        mean: By which the images were normalised, one number a channel; kept, to refuse a model with another.
        std: The same.
        progress: Shows a bar on a terminal.

    Returns:
        The vocabulary.

    Raises:
        ArgumentError: If `words` or `patch_size` is below 1, or there are more words than patches.
        DataError: If there is no image, one is smaller than a patch, channels differ, or pixels are not finite.

    Example:
        >>> import torch
        >>> import lightning_prune as lp
        >>> images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> lp.learn_vocabulary([images], patch_size=8, words=20).centroids.shape
        torch.Size([20, 192])
    """
    learner = WordLearner(patch_size, words, seed)
    with ticking(f"Learning {words} words", None, progress) as tick:
        for images in batches:
            learner.add(images)
            tick()
        return learner.finish(mean, std)


class WordLearner:
    """The same for images that come by themselves: `add` them, then `finish`.

    Args:
        patch_size: Side of the patches, in pixels.
        words: How many words.
        seed: See `learn_vocabulary`.

    Attributes:
        images: How many were added.
        patches: How many they were cut into.

    Raises:
        ArgumentError: If `words` or `patch_size` is no whole number >= 1, or `seed` none from 0 to 2^32 - 1.

    Example:
        >>> import torch
        >>> from lightning_prune.vocabulary_learning import WordLearner
        >>> learner = WordLearner(patch_size=4, words=2)
        >>> learner.add(torch.eye(8).expand(1, 1, 8, 8))
        >>> len(learner.finish()), learner.patches
        (2, 4)
    """

    def __init__(self, patch_size: int, words: int, seed: int = 0) -> None:
        for name, value in (("patch_size", patch_size), ("words", words)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ArgumentError(f"`{name}` must be a whole number >= 1, got {value!r}.")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise ArgumentError(f"`seed` must be a whole number from 0 to 2^32 - 1, got {seed!r}.")
        self.patch_size, self.words, self.seed = patch_size, words, seed
        self.images = self.patches = 0
        self._step = max(_STEP * words, _LEAST_STEP)
        self._waiting: list[NDArray[np.float32]] = []
        self._means: Any = None  # scikit-learn's estimator

    def add(self, images: Tensor) -> None:
        """Learns from images (B, channels, height, width), normalised; keeps no reference to them.

        Raises:
            DataError: See `learn_vocabulary`.
        """
        if images.ndim != 4 or min(images.shape[2:]) < self.patch_size:
            raise DataError(
                f"Images must be (batch, channels, height, width), no side below a patch of {self.patch_size} pixels; "
                f"got {tuple(images.shape)}."
            )
        patches = cut(images.detach().to("cpu", torch.float32), self.patch_size).flatten(0, 1)
        if not patches.isfinite().all():
            raise DataError("Pixels must be finite numbers; some of an image are not.")
        if self._waiting and self._waiting[0].shape[1] != patches.shape[1]:
            before = self._waiting[0].shape[1] // self.patch_size**2
            raise DataError(f"All images must have as many channels: {before} before, {images.shape[1]} now.")
        self.images += len(images)
        self.patches += len(patches)
        self._waiting.append(patches.numpy().copy())  # patches of one pixel would be a view of the images
        if sum(map(len, self._waiting)) >= self._step:
            together = np.concatenate(self._waiting)
            whole = len(together) // self._step * self._step
            for start in range(0, whole, self._step):  # steps of one size, so that batches of any size give one result
                self._learn(together[start : start + self._step])
            self._waiting = [together[whole:].copy()]  # a view would keep all of it

    def finish(self, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> Vocabulary:
        """The vocabulary of all that was added.

        Args:
            mean: See `learn_vocabulary`.
            std: See `learn_vocabulary`.

        Raises:
            ArgumentError: If there are more words than patches.
            DataError: If nothing was added.
        """
        if not self.images:
            raise DataError("There is no image to learn words from.")
        if self.words > self.patches:
            raise ArgumentError(
                f"`words` must be at most the number of patches, {self.patches} of {self.images} images; got "
                f"{self.words}."
            )
        rest = np.concatenate(self._waiting)
        if len(rest):
            self._learn(rest)
            self._waiting = [rest[:0]]
        return Vocabulary(
            torch.from_numpy(self._means.cluster_centers_), self.patch_size, mean, std, self.patches, self.seed
        )

    def _learn(self, patches: NDArray[np.float32]) -> None:
        from sklearn.cluster import MiniBatchKMeans  # takes a second to import

        if self._means is None:
            self._means = MiniBatchKMeans(
                self.words,
                init="k-means++" if self.words <= _CHOSEN_WELL else "random",
                random_state=self.seed,
                n_init=1,
                init_size=len(patches),
                compute_labels=False,
            )
        self._means.partial_fit(patches)
