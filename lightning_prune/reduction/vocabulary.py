"""Vocabularies of visual words, and their files (arXiv 2411.15397)."""

import hashlib
import json
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_prune._utils.files import atomic_write, user_path
from lightning_prune._utils.validation import check, check_int, check_path, is_int
from lightning_prune.errors import ArgumentError, FileFormatError

_FORMAT, _VERSION = "lightning_prune.vocabulary", 1


class Vocabulary:
    """Visual words (arXiv 2411.15397), learned by `lightning_prune.learn_vocabulary` from unlabelled images.

    Immutable. Two vocabularies are equal if they have the same words, patch size and normalisation.

    Args:
        centroids: (words, channels * patch_size * patch_size), the means of similar patches of normalised images. A
            patch is stored channel by channel, each row by row.
        patch_size: Side of the square patches, in pixels.
        mean: Mean of each channel with which the images were normalised; None if unknown.
        std: Standard deviation of each channel with which the images were normalised; None if unknown.
        patches: Number of patches that the words were learned from.
        seed: Seed that they were learned with.
        source: The file that the vocabulary was read from; empty if there is none.

    Attributes:
        digest: SHA-256 of words, patch size and normalisation, in hexadecimal.

    Raises:
        ArgumentError: If `centroids` has another shape or holds non-finite numbers, or if `mean` or `std` does not have
            one number per channel.

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
        check_int("patch_size", patch_size, 1, "a number of pixels")
        check("centroids", centroids, "a tensor", isinstance(centroids, Tensor))
        check_int("patches", patches, 0)
        check("seed", seed, "an integer >= 0 or None", seed is None or is_int(seed, 0))
        valid = centroids.ndim == 2 and centroids.numel() > 0 and centroids.shape[1] % patch_size**2 == 0
        expected = f"of shape (words, channels * {patch_size} * {patch_size})"
        check("centroids", tuple(centroids.shape), expected, valid)
        self.centroids = centroids.detach().to("cpu", torch.float32, copy=True).contiguous()
        if not self.centroids.isfinite().all():
            raise ArgumentError("`centroids` must hold finite numbers, got NaN or infinity.")
        self.patch_size = patch_size
        self.channels = centroids.shape[1] // patch_size**2
        self.mean, self.std = _per_channel("mean", mean, self.channels), _per_channel("std", std, self.channels)
        self.patches, self.seed, self.source = patches, seed, source
        header = json.dumps([list(self.centroids.shape), patch_size, self.mean, self.std]).encode()
        self.digest = hashlib.sha256(header + self.centroids.numpy().tobytes()).hexdigest()
        self._units = {torch.device("cpu"): normalize(self.centroids, dim=1)}  # device -> words of unit length

    def __len__(self) -> int:
        return len(self.centroids)

    def units(self, device: torch.device) -> Tensor:
        """The words scaled to unit length, (words, D) float32 on a device. They are copied to each device once."""
        units = self._units.get(device)
        if units is None:
            units = self._units[torch.device("cpu")].to(device)
            if not torch.compiler.is_compiling():  # a traced tensor must not be stored
                self._units[device] = units
        return units

    def save(self, path: str | Path) -> Path:
        """Writes a `.safetensors` file with the words, and everything else as metadata; returns the path.

        Raises:
            ArgumentError: If `path` has another suffix.
            FileWriteError: If the file cannot be written.
        """
        from safetensors.torch import save

        check_path("path", path)
        target = user_path(path)
        check("path", str(target), "a file that ends in .safetensors", target.suffix == ".safetensors")
        properties = {
            "patch_size": self.patch_size,
            "channels": self.channels,
            "words": len(self),
            "mean": self.mean,
            "std": self.std,
            "patches": self.patches,
            "seed": self.seed,
        }
        metadata = {"format": _FORMAT, "version": str(_VERSION), "facts": json.dumps(properties)}
        with atomic_write(target) as temporary:
            temporary.write_bytes(save({"centroids": self.centroids}, metadata=metadata))
        return target

    @classmethod
    def load(cls, path: str | Path) -> "Vocabulary":
        """Reads a file written by `save`, without executing anything in it.

        Raises:
            FileFormatError: If the file is missing or truncated, or has another format or version.
        """
        check_path("path", path)
        source = user_path(path)
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
            properties: dict[str, Any] = json.loads(metadata["facts"])
            rest = {key: properties[key] for key in ("mean", "std", "patches", "seed")}
            loaded = cls(centroids, properties["patch_size"], **rest, source=str(source))
            if (len(loaded), loaded.channels) != (properties["words"], properties["channels"]):
                raise ValueError("its metadata contradict the shape of its words")
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
        """Leaves out the copies on other devices, which another process may not have."""
        cpu = torch.device("cpu")
        return {**vars(self), "_units": {cpu: self._units[cpu]}}


def _read(source: Path) -> tuple[dict[str, str], Tensor]:
    from safetensors import safe_open

    if not source.is_file():
        raise FileFormatError(f"Cannot read {source}: it does not exist or is a folder.")
    try:
        with safe_open(source, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            words = file.get_tensor("centroids") if "centroids" in file.keys() else torch.empty(0)  # noqa: SIM118
            return metadata, words
    except Exception as error:  # safetensors raises an error class of its own, and others
        reason = " ".join(str(error).split())
        raise FileFormatError(f"{source} is damaged or not a {_FORMAT} file: {reason}") from error


def _per_channel(name: str, values: Sequence[float] | None, channels: int) -> tuple[float, ...] | None:
    if values is None:
        return None
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        numbers = ()
    valid = len(numbers) == channels and all(map(isfinite, numbers))
    check(name, values, f"one number for each of {channels} channels", valid)
    return numbers
