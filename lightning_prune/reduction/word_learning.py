"""Learns visual words from unlabelled images by mini-batch k-means (arXiv 2411.15397)."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_prune._utils.progress import progress_bar
from lightning_prune._utils.validation import check, check_bool, check_int, is_int
from lightning_prune.errors import DataError
from lightning_prune.reduction.patchify import cut
from lightning_prune.reduction.vocabulary import Vocabulary

_PATCHES_PER_WORD = 3  # size of a mini-batch, and of the sample for the initial words, as in scikit-learn
_MIN_BATCH = 1024  # patches, the default mini-batch of scikit-learn
_MAX_KMEANS_PP = 2048  # words; with more, k-means++ takes many minutes, and a third of the patches differ enough anyway


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
    """Learns visual words from unlabelled images: the centroids of their patches by mini-batch k-means.

    Source: arXiv 2411.15397. The images are read once, and about three patches per word are held in memory. The words
    do not depend on the batch size. The initial words are patches chosen by k-means++, or at random if there are more
    than 2048 words.

    Args:
        batches: Images (B, channels, height, width), resized and normalised as for the model.
        patch_size: Side of the model's patches, in pixels; a border narrower than that is ignored.
        words: Number of words.
        seed: Seed of the initial words, and of the replacement of unused words.
        mean: Mean of each channel with which the images were normalised. It is stored, so that the vocabulary cannot be
            used with a model that has another normalisation.
        std: Standard deviation of each channel, likewise.
        progress: Whether to show a progress bar on a terminal.

    Returns:
        The vocabulary.

    Raises:
        ArgumentError: If an argument is out of its range, or there are more words than patches.
        DataError: If there are no images, if an image is smaller than a patch or has another number of channels, or if
            pixels are not finite.

    Example:
        >>> import torch
        >>> import lightning_prune as lp
        >>> images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> lp.learn_vocabulary([images], patch_size=8, words=20).centroids.shape
        torch.Size([20, 192])
    """
    learner = WordLearner(patch_size, words, seed)
    check_bool("progress", progress)
    check("batches", batches, "batches of images (B, channels, height, width)", isinstance(batches, Iterable))
    with progress_bar(f"Learning {words} words", None, progress) as tick:
        for images in batches:
            learner.add(images)
            tick()
        return learner.finish(mean, std)


class WordLearner:
    """Learns visual words from batches that are added one by one; see `learn_vocabulary`.

    Args:
        patch_size: Side of the patches, in pixels.
        words: Number of words.
        seed: See `learn_vocabulary`.

    Attributes:
        images: Number of images added so far.
        patches: Number of their patches.

    Raises:
        ArgumentError: If `words` or `patch_size` is not an integer >= 1, or `seed` is not one from 0 to 2^32 - 1.

    Example:
        >>> import torch
        >>> from lightning_prune.reduction.word_learning import WordLearner
        >>> learner = WordLearner(patch_size=4, words=2)
        >>> learner.add(torch.eye(8).expand(1, 1, 8, 8))
        >>> len(learner.finish()), learner.patches
        (2, 4)
    """

    def __init__(self, patch_size: int, words: int, seed: int = 0) -> None:
        check_int("patch_size", patch_size, 1, "a number of pixels")
        check_int("words", words, 1, "a number of words")
        check("seed", seed, "an integer in [0, 2^32 - 1]", is_int(seed, 0) and seed < 2**32)
        self.patch_size, self.words, self.seed = patch_size, words, seed
        self.images = self.patches = 0
        self._batch_size = max(_PATCHES_PER_WORD * words, _MIN_BATCH)
        self._pending: list[NDArray[np.float32]] = []
        self._kmeans: Any = None  # scikit-learn's estimator

    def add(self, images: Tensor) -> None:
        """Adds normalised images (B, channels, height, width); keeps no reference to them.

        Raises:
            DataError: See `learn_vocabulary`.
        """
        shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        if not isinstance(images, Tensor) or images.ndim != 4 or min(images.shape[2:]) < self.patch_size:
            raise DataError(
                f"`images` must be batches (B, channels, height, width) with sides >= {self.patch_size}, the "
                f"patch size, got {shape}."
            )
        patches = cut(images.detach().to("cpu", torch.float32), self.patch_size).flatten(0, 1)
        if not patches.isfinite().all():
            raise DataError("`images` must hold finite numbers, got NaN or infinity.")
        if self._pending and self._pending[0].shape[1] != patches.shape[1]:
            before = self._pending[0].shape[1] // self.patch_size**2
            raise DataError(f"`images` must have {before} channels, as the images before, got {images.shape[1]}.")
        self.images += len(images)
        self.patches += len(patches)
        self._pending.append(patches.numpy().copy())  # patches of one pixel would be a view of the images
        if sum(map(len, self._pending)) >= self._batch_size:
            pending = np.concatenate(self._pending)
            end = len(pending) // self._batch_size * self._batch_size
            for start in range(0, end, self._batch_size):  # a fixed size makes the result independent of the batches
                self._learn(pending[start : start + self._batch_size])
            self._pending = [pending[end:].copy()]  # a view would keep the whole array in memory

    def finish(self, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> Vocabulary:
        """Returns the vocabulary of all images that were added.

        Args:
            mean: See `learn_vocabulary`.
            std: See `learn_vocabulary`.

        Raises:
            ArgumentError: If there are more words than patches.
            DataError: If no images were added.
        """
        if not self.images:
            raise DataError("`batches` must hold at least one image, got none.")
        expected = f"at most the number of patches, {self.patches} of {self.images} images"
        check("words", self.words, expected, self.words <= self.patches)
        rest = np.concatenate(self._pending)
        if len(rest):
            self._learn(rest)
            self._pending = [rest[:0]]
        return Vocabulary(
            torch.from_numpy(self._kmeans.cluster_centers_), self.patch_size, mean, std, self.patches, self.seed
        )

    def _learn(self, patches: NDArray[np.float32]) -> None:
        from sklearn.cluster import MiniBatchKMeans  # takes a second to import

        if self._kmeans is None:
            self._kmeans = MiniBatchKMeans(
                self.words,
                init="k-means++" if self.words <= _MAX_KMEANS_PP else "random",
                random_state=self.seed,
                n_init=1,
                init_size=len(patches),
                compute_labels=False,
            )
        self._kmeans.partial_fit(patches)
