"""Latency profiles on disk: a profile is measured once and read again under the same conditions."""

import warnings
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from lightning_prune.errors import FileFormatError
from lightning_prune.profiling.latency_profile import LatencyProfile
from lightning_prune.profiling.store_folder import StoreFolder

_FORMAT, _VERSION = "lightning_prune.stored_profile", 2
# Conditions that the profile itself names, too; they must be those of its key.
_REPEATED = ("device", "device_type", "threads", "batch_size", "image_shape", "precision", "compiled", "model")


class ProfileStore:
    """A folder of latency profiles, one file for each set of conditions.

    The conditions are those of `profile_dependencies`: device and threads; structure of the model (not its weights);
    images, batch, precision and runtime; method with its settings and block; protocol; kernel settings of torch;
    versions of torch, of this package and of the packages of the model. An entry that is damaged, or was measured under
    other conditions, is skipped with a warning. Entries are written whole or not at all, so several processes can share
    a folder.

    Args:
        folder: The folder; a leading `~` is the user's home. None takes the environment variable LIGHTNING_PRUNE_CACHE
            or else the user's cache folder (`~/.cache/lightning_prune` on Linux, `~/Library/Caches/lightning_prune` on
            macOS).

    Example:
        >>> import tempfile
        >>> from lightning_prune.profiling import ProfileStore
        >>> store = ProfileStore(tempfile.mkdtemp())
        >>> store.get({"device": "mine", "batch_size": 1}) is None
        True
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self._files = StoreFolder(folder, _FORMAT, _VERSION, ("latency profiles", "latency profile"))
        self.folder = self._files.path

    def get(self, dependencies: Mapping[str, Any], time_limit: float | None = None) -> LatencyProfile | None:
        """Returns the profile that was measured under exactly these conditions, or None.

        Args:
            dependencies: As `profile_dependencies` returns them.
            time_limit: Seconds that a new measurement would have. A kept profile that had less, and had not converged,
                is skipped.
        """
        file = self._files.file(dependencies)
        if file is None:
            return None
        try:
            entry = self._entry(file, dependencies)
        except (FileFormatError, OSError) as error:
            self._files.warn_unreadable(error)
            return None
        return entry.profile if entry is not None and _suffices(entry, time_limit) else None

    def put(
        self,
        dependencies: Mapping[str, Any],
        profile: LatencyProfile,
        time_limit: float | None = None,
        replace: bool = False,
    ) -> Path | None:
        """Keeps a profile, unless a better one is there.

        A converged profile is better than one that is not; of two that are not, the one with the longer time limit is
        better, and None is the shortest. Where the better one stays, or the folder cannot be written, a warning says
        so.

        Args:
            dependencies: The conditions of the measurement.
            profile: What was measured.
            time_limit: Seconds that the measurement had, None without a limit.
            replace: Whether to replace also a better one, as it does not hold any more.

        Returns:
            The file; None where nothing was written.
        """
        file = self._files.file(dependencies)
        if file is None:
            return None
        try:
            present = self._entry(file, dependencies)
        except (FileFormatError, OSError):  # damaged, or the folder cannot be searched, as writing will say
            present = None
        if present is not None and not replace and _rank(present) > _rank(_Entry(profile, time_limit)):
            why = "it converged" if present.profile.converged else "it had more time"
            warnings.warn(
                f"This run uses the profile that it has measured (time_limit={time_limit}). Later runs use the kept "
                f"one (time_limit={present.time_limit}), as {why}: {file}.",
                stacklevel=2,
            )
            return None
        values = {
            "time_limit": time_limit,
            "measured": datetime.now().astimezone().isoformat(timespec="seconds"),
            "profile": profile.to_dict(),
        }
        return self._files.save(file, dependencies, values)

    def _entry(self, file: Path, dependencies: Mapping[str, Any]) -> "_Entry | None":
        """The entry of these conditions; None where there is none.

        Raises:
            FileFormatError: If it is damaged, or its profile is of other conditions; names the file.
            OSError: If the folder cannot be searched.
        """
        document = self._files.load(file, dependencies)
        return None if document is None else _entry_of(file, document, dependencies)


class _Entry(NamedTuple):
    """A profile and the time limit that it was measured with."""

    profile: LatencyProfile
    time_limit: float | None


def _suffices(entry: _Entry, time_limit: float | None) -> bool:
    """Whether a new measurement would not improve an entry; without a time limit, other counts are measured."""
    if entry.time_limit is None or time_limit is None:
        return entry.time_limit is time_limit
    return entry.profile.converged or entry.time_limit >= time_limit


def _rank(entry: _Entry) -> tuple[bool, float]:
    return (True, 0.0) if entry.profile.converged else (False, -1.0 if entry.time_limit is None else entry.time_limit)


def _entry_of(path: Path, document: Mapping[str, Any], dependencies: Mapping[str, Any]) -> _Entry:
    """The entry that a document holds.

    Raises:
        FileFormatError: If it is damaged, or its profile is of other conditions; names the file.
    """
    time_limit, values = document.get("time_limit"), document.get("profile")
    if time_limit is not None and (isinstance(time_limit, bool) or not isinstance(time_limit, int | float)):
        raise FileFormatError(f"`time_limit` in {path} must be a number or null, got {time_limit!r}.")
    if not isinstance(values, dict):
        raise FileFormatError(f"{path} holds no profile.")
    try:
        profile = LatencyProfile.from_dict(values)
    except FileFormatError as error:
        raise FileFormatError(f"{path} holds no usable profile: {error}") from error
    _check_conditions(path, profile, dependencies)
    return _Entry(profile, time_limit)


def _check_conditions(path: Path, profile: LatencyProfile, dependencies: Mapping[str, Any]) -> None:
    own = {"depth": profile.depth, "protocol": profile.protocol}
    if profile.protocol == "deployed":  # the paper's protocol drops random tokens, whatever the method
        own |= {"method": profile.method, "block": profile.block}
    conditions = {**profile.context, **own}
    for key in (*_REPEATED, *own):
        if key in dependencies and conditions.get(key) != dependencies[key]:
            raise FileFormatError(
                f"{path} holds a profile of another {key}: {conditions.get(key)!r} instead of {dependencies[key]!r}."
            )
