"""Latency profiles on disk: a profile is measured once and read again under the same conditions."""

import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from platformdirs import user_cache_path
from torch import Tensor, nn

from lightning_prune._utils.files import read_document, write_document
from lightning_prune.errors import FileFormatError, FileWriteError
from lightning_prune.patching import find_vision_transformer
from lightning_prune.patching.schedule_forms import reducing_block
from lightning_prune.profiling.environment import profile_dependencies, unknown_conditions
from lightning_prune.profiling.latency_profile import LatencyProfile
from lightning_prune.profiling.measurement import (
    TOKEN_CURVE,
    ProfilingMode,
    check_measurable,
    compare_latency,
    profile_latency,
)
from lightning_prune.reduction import Reduction


@dataclass(frozen=True)
class CheckTuning:
    """Constants of the check of a kept profile.

    Attributes:
        rounds: Runs of the dense model.
        time_share: Share of the time limit that they may take.
        max_ratio: A profile whose dense latency is off by more than this factor does not hold any more.
    """

    rounds: int = 5
    time_share: float = 0.1
    max_ratio: float = 1.5


_CHECK = CheckTuning()
_FORMAT, _VERSION = "lightning_prune.stored_profile", 2
_FOLDER_VARIABLE = "LIGHTNING_PRUNE_CACHE"
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
        self.folder: Path | None = None
        try:
            self.folder = Path(folder).expanduser() if folder is not None else _default_folder()
        except RuntimeError as error:  # no HOME, and no entry in the user database
            warnings.warn(f"Latency profiles are not kept: {error}", stacklevel=2)

    def get(self, dependencies: Mapping[str, Any], time_limit: float | None = None) -> LatencyProfile | None:
        """Returns the profile that was measured under exactly these conditions, or None.

        Args:
            dependencies: As `profile_dependencies` returns them.
            time_limit: Seconds that a new measurement would have. A kept profile that had less, and had not converged,
                is skipped.
        """
        if self.folder is None or unknown_conditions(dependencies):
            return None
        try:
            entry = _find_entry(self._path(self.folder, dependencies), dependencies)
        except FileFormatError as error:
            warnings.warn(f"A kept profile is skipped and will be measured again and replaced: {error}", stacklevel=2)
            return None
        except OSError as error:  # a home that belongs to another user, for example
            warnings.warn(f"Kept profiles cannot be read in {self.folder}: {error.strerror or error}", stacklevel=2)
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
        if self.folder is None or unknown_conditions(dependencies):
            return None
        path = self._path(self.folder, dependencies)
        try:
            present = _find_entry(path, dependencies)
        except (FileFormatError, OSError):  # damaged, or the folder cannot be searched, as writing will say
            present = None
        if present is not None and not replace and _rank(present) > _rank(_Entry(profile, time_limit)):
            warnings.warn(
                f"The profile in {path} (time_limit={present.time_limit}) is better than the new one "
                f"(time_limit={time_limit}) and is kept. Use a longer time limit or delete the file to replace it.",
                stacklevel=2,
            )
            return None
        document = {
            "format": _FORMAT,
            "version": _VERSION,
            "dependencies": _plain(dependencies),
            "time_limit": time_limit,
            "measured": datetime.now().astimezone().isoformat(timespec="seconds"),
            "profile": profile.to_dict(),
        }
        try:
            return write_document(path, document)
        except FileWriteError as error:
            warnings.warn(f"The profile is not kept for other runs: {error}", stacklevel=2)
            return None

    @staticmethod
    def _path(folder: Path, dependencies: Mapping[str, Any]) -> Path:
        text = json.dumps(_plain(dependencies), sort_keys=True)
        return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"


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


def _find_entry(path: Path, dependencies: Mapping[str, Any]) -> _Entry | None:
    """The entry of these conditions; None where there is none.

    Raises:
        FileFormatError: As `_read_entry`.
        OSError: If the folder cannot be searched.
    """
    return _read_entry(path, dependencies) if path.exists() else None


def _read_entry(path: Path, dependencies: Mapping[str, Any]) -> _Entry:
    """Reads an entry and checks that it is of these conditions.

    Raises:
        FileFormatError: If it is damaged, or its profile is of other conditions; names the file.
    """
    document = read_document(path, _FORMAT, _VERSION)
    time_limit = document.get("time_limit")
    values = document.get("profile")
    if document.get("dependencies") != _plain(dependencies):
        raise FileFormatError(f"{path} must be of the conditions of its name, got others.")
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


def _default_folder() -> Path:
    named = os.environ.get(_FOLDER_VARIABLE)
    return Path(named).expanduser() if named else user_cache_path("lightning_prune", appauthor=False)


def _plain(dependencies: Mapping[str, Any]) -> dict[str, Any]:
    """The conditions as they come back from a file."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(dependencies)))
    return plain


def _still_holds(
    profile: LatencyProfile,
    model: nn.Module,
    example_inputs: Tensor,
    time_limit: float | None,
    module_path: str | None,
    clock: Callable[[], float],
) -> bool:
    """Whether the dense model takes about as long as when a profile was measured; warns if it does not.

    The conditions of a profile do not include the load of the machine, its clock rate or its memory allocator.
    """
    seconds = None if time_limit is None else _CHECK.time_share * time_limit
    now = compare_latency(
        model,
        example_inputs,
        {"dense": None},
        rounds=_CHECK.rounds,
        time_limit=seconds,
        module_path=module_path,
        verbose=False,
        clock=clock,
    )["dense"]
    ratio = now.milliseconds / profile.dense_ms
    if 1 / _CHECK.max_ratio <= ratio <= _CHECK.max_ratio:
        return True
    warnings.warn(
        f"The kept latency profile is measured again: it says that the dense model takes {profile.dense_ms:.3g} ms, "
        f"which now takes {now.milliseconds:.3g} ms.",
        stacklevel=3,
    )
    return False


class CachedProfile(NamedTuple):
    """A profile and where it is from.

    Attributes:
        profile: The latency profile.
        reused: Whether it was read from the store and not measured.
    """

    profile: LatencyProfile
    reused: bool


def get_or_profile(
    model: nn.Module,
    example_inputs: Tensor,
    store: ProfileStore | None,
    *,
    method: Reduction = TOKEN_CURVE,
    block: int | float = 0.25,
    protocol: ProfilingMode = "deployed",
    time_limit: float | None = 30.0,
    module_path: str | None = None,
    verbose: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> CachedProfile:
    """Returns the kept profile of exactly these conditions, or measures one and keeps it.

    A kept profile is only reused if the dense model takes about as long as it did when the profile was measured: it is
    timed a few times, and a warning says so where it does not. Inconclusive profiles are not kept, as the machine was
    busy. Nor are profiles of a model with an unknown condition,
    such as one that the user compiled; a warning says so.

    Args:
        model: Any module that contains one Vision Transformer.
        example_inputs: (B, C, H, W) images; see `lightning_prune.profile_latency`.
        store: Where profiles are kept; None measures and keeps nothing.
        method: As in `profile_latency`.
        block: As in `profile_latency`.
        protocol: As in `profile_latency`.
        time_limit: Seconds for measuring. A kept profile that had less is not reused, unless it converged.
        module_path: Dotted path of the transformer in `model`.
        verbose: Shows a progress bar on a terminal.
        clock: Returns seconds.

    Raises:
        ArgumentError: As `profile_latency`, also where a profile is kept.
        UnsupportedModelError: As `lightning_prune.patch`.
    """
    transformer = find_vision_transformer(model, module_path)
    check_measurable(transformer, example_inputs, time_limit, protocol)
    dependencies, kept = None, None
    if store is not None:
        index = reducing_block(method, block, transformer)
        dependencies = profile_dependencies(transformer, example_inputs, method, index, protocol)
        kept = store.get(dependencies, time_limit)
        if kept is not None and _still_holds(kept, model, example_inputs, time_limit, module_path, clock):
            return CachedProfile(kept, reused=True)
        unknown = unknown_conditions(dependencies)
        if unknown:
            warnings.warn(
                f"The latency profile is measured every time and not kept: {', '.join(unknown)} cannot be compared "
                "with those of another run.",
                stacklevel=2,
            )
    profile = profile_latency(
        model,
        example_inputs,
        method=method,
        block=block,
        protocol=protocol,
        time_limit=time_limit,
        module_path=module_path,
        verbose=verbose,
        clock=clock,
    )
    if store is not None and dependencies is not None and not profile.is_inconclusive:
        store.put(dependencies, profile, time_limit, replace=kept is not None)
    return CachedProfile(profile, reused=False)
