"""Vocabularies of visual words: the document, and learning one from unlabelled images (arXiv 2411.15397)."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from lightning_prune._utils.files import atomic_write
from lightning_prune._utils.progress import progress_bar
from lightning_prune.errors import ArgumentError, DataError, FileFormatError
from lightning_prune.reduction.patchify import cut

_FORMAT, _VERSION = "lightning_prune.vocabulary", 1


class Vocabulary:
    """Visual words (arXiv 2411.15397), learned by `lightning_prune.learn_vocabulary` from unlabelled images.

    Immutable; equal to another of the same words for the same patches and normalisation, wherever they came from.

    Args:
        centroids: (words, channels * patch_size * patch_size): each the mean of similar patches of images as the model
            sees them, normalised; the first channel row by row, then the next.
        patch_size: Side of the square patches, in pixels.
        mean: Of each channel, subtracted from the images; None where unknown.
        std: Of each channel, by which they were divided; None where unknown.
        patches: How many patches the words were learned from.
        seed: That they were learned with.
        source: The file that it was read from; empty for none.

    Attributes:
        digest: SHA-256 of all that makes two vocabularies equal, in hexadecimal.

    Raises:
        ArgumentError: If the centroids are no such table of finite numbers, or mean and std not one number a channel.

    Example:
        >>> import torch
        >>> from lightning_prune.reduction.vocabulary import Vocabulary
        >>> vocabulary = Vocabulary(torch.randn(10, 3 * 8 * 8), patch_size=8)
        >>> path = vocabulary.save("words.safetensors")
        >>> Vocabulary.load(path) == vocabulary
        True
    """

    def __init__(
        self,
        centroids: Tensor,
        patch_size: int,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        patches: int = 0,
        seed: int | None = None,
        source: str = "",
    ) -> None:
        if isinstance(patch_size, bool) or not isinstance(patch_size, int) or patch_size < 1:
            raise ArgumentError(f"`patch_size` must be a whole number of pixels >= 1, got {patch_size!r}.")
        if centroids.ndim != 2 or not centroids.numel() or centroids.shape[1] % patch_size**2:
            raise ArgumentError(
                f"`centroids` must be (words, channels * {patch_size} * {patch_size}), got {tuple(centroids.shape)}."
            )
        self.centroids = centroids.detach().to("cpu", torch.float32, copy=True).contiguous()
        if not self.centroids.isfinite().all():
            raise ArgumentError("`centroids` must be finite numbers; some are not.")
        self.patch_size = patch_size
        self.channels = centroids.shape[1] // patch_size**2
        self.mean, self.std = _per_channel("mean", mean, self.channels), _per_channel("std", std, self.channels)
        self.patches, self.seed, self.source = patches, seed, source
        facts = json.dumps([list(self.centroids.shape), patch_size, self.mean, self.std]).encode()
        self.digest = hashlib.sha256(facts + self.centroids.numpy().tobytes()).hexdigest()
        self._units = {torch.device("cpu"): normalize(self.centroids, dim=1)}  # device -> words of length one

    def __len__(self) -> int:
        return len(self.centroids)

    def units(self, device: torch.device) -> Tensor:
        """The words scaled to length one, (words, D) float32 on a device; copied there once."""
        kept = self._units.get(device)
        if kept is None:
            kept = self._units[torch.device("cpu")].to(device)
            if not torch.compiler.is_compiling():  # what is traced is no tensor to keep
                self._units[device] = kept
        return kept

    def save(self, path: str | Path) -> Path:
        """Writes a `.safetensors` with the words and, as metadata, everything else; returns the path.

        Raises:
            ArgumentError: If the name ends otherwise.
        """
        from safetensors.torch import save_file

        target = Path(path)
        if target.suffix != ".safetensors":
            raise ArgumentError(f"A vocabulary is saved as .safetensors, got {str(target)!r}.")
        facts = {
            "patch_size": self.patch_size,
            "channels": self.channels,
            "words": len(self),
            "mean": self.mean,
            "std": self.std,
            "patches": self.patches,
            "seed": self.seed,
        }
        metadata = {"format": _FORMAT, "version": str(_VERSION), "facts": json.dumps(facts)}
        with atomic_write(target) as temporary:
            save_file({"centroids": self.centroids}, temporary, metadata=metadata)
        return target

    @classmethod
    def load(cls, path: str | Path) -> "Vocabulary":
        """Reads what `save` wrote; nothing in the file is executed.

        Raises:
            FileFormatError: If the file is missing, truncated, of another kind, or of another version.
        """
        source = Path(path)
        metadata, centroids = _read(source)
        found = metadata.get("format")
        if found != _FORMAT:
            what = f"format {found!r}" if found else "no format entry"
            raise FileFormatError(f"{source} is not a {_FORMAT} file: it has {what}.")
        if metadata.get("version") != str(_VERSION):
            came = metadata.get("version")
            raise FileFormatError(
                f"{source} is a {_FORMAT} file of version {came!r}; this release reads version {_VERSION}."
            )
        try:
            facts: dict[str, Any] = json.loads(metadata["facts"])
            rest = {key: facts[key] for key in ("mean", "std", "patches", "seed")}
            loaded = cls(centroids, facts["patch_size"], **rest, source=str(source))
            if (len(loaded), loaded.channels) != (facts["words"], facts["channels"]):
                raise ValueError("its words and what it says of them do not agree")
        except (ArgumentError, KeyError, TypeError, ValueError) as error:
            raise FileFormatError(f"{source} is a damaged {_FORMAT} file: {error}") from error
        return loaded

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        side = self.patch_size
        return f"Vocabulary({len(self)} words of {self.channels} x {side} x {side}, {self.digest[:12]})"

    def __deepcopy__(self, memo: dict[int, Any]) -> "Vocabulary":
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Without what lies on devices that another process may not have."""
        cpu = torch.device("cpu")
        return {**vars(self), "_units": {cpu: self._units[cpu]}}


def _read(source: Path) -> tuple[dict[str, str], Tensor]:
    from safetensors import safe_open

    if not source.is_file():
        raise FileFormatError(f"Cannot read {source}: it does not exist, or is a folder.")
    try:
        with safe_open(source, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            words = file.get_tensor("centroids") if "centroids" in file.keys() else torch.empty(0)  # noqa: SIM118
            return metadata, words
    except Exception as error:  # safetensors has a kind of its own for damage, and passes on others
        reason = " ".join(str(error).split())
        raise FileFormatError(f"{source} is damaged or not a {_FORMAT} file: {reason}") from error


def _per_channel(name: str, values: Sequence[float] | None, channels: int) -> tuple[float, ...] | None:
    if values is None:
        return None
    numbers = tuple(float(value) for value in values)
    if len(numbers) != channels:
        raise ArgumentError(f"`{name}` must be one number for each of {channels} channels, got {numbers}.")
    return numbers


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
    with progress_bar(f"Learning {words} words", None, progress) as tick:
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
        >>> from lightning_prune.reduction.vocabulary import WordLearner
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
