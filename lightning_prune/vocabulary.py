"""A vocabulary of visual words: patches that come again and again, as centroids of raw normalised patches."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_prune.errors import ArgumentError, FileFormatError
from lightning_prune.files import replacing

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
        >>> from lightning_prune.vocabulary import Vocabulary
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
        with replacing(target) as temporary:
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
