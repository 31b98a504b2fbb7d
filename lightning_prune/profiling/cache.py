"""The cache of latency profiles on disk."""

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from platformdirs import user_cache_path
from torch import Tensor, nn

from lightning_prune._utils.files import read_document, write_document
from lightning_prune.errors import FileFormatError
from lightning_prune.patching import find_vision_transformer
from lightning_prune.patching.schedule_forms import reducing_block
from lightning_prune.profiling.environment import profile_dependencies, readable
from lightning_prune.profiling.latency_profile import LatencyProfile
from lightning_prune.profiling.measurement import Protocol, check_measurable, profile_latency
from lightning_prune.reduction import Reduction

_FORMAT, _VERSION = "lightning_prune.stored_profile", 1
_FOLDER = "LIGHTNING_PRUNE_CACHE"  # the environment variable that names another folder than the user's cache
_TOLD = ("device", "device_type", "threads", "batch_size", "image_shape", "precision", "compiled", "model")


class ProfileStore:
    """A folder of profiles, one file for each set of things that latency depends on.

    These are what `profile_dependencies` says: the device and its threads, the structure of the model (not its
    weights), the images, batch, precision and how the model is compiled, the method with its settings and block, the
    protocol, the switches of torch, and the versions of torch, this package and those that the model is from. An entry
    that was measured under anything else, or that is damaged, is passed over with a warning. Entries appear whole or
    not at all, so several processes may use one folder.

    Args:
        folder: Where; if None, what the environment variable LIGHTNING_PRUNE_CACHE says, else `lightning_prune` in the
            user's cache folder (`~/.cache` on Linux, `~/Library/Caches` on macOS). A leading `~` is the user's home.

    Example:
        >>> import tempfile
        >>> from lightning_prune.profiling import ProfileStore
        >>> store = ProfileStore(tempfile.mkdtemp())
        >>> store.get({"device": "mine", "batch_size": 1}) is None
        True
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = Path(folder).expanduser() if folder is not None else _default_folder()

    def get(self, dependencies: Mapping[str, Any], seconds: float | None = None) -> LatencyProfile | None:
        """The profile that was measured under exactly these conditions, or None.

        Args:
            dependencies: As `profile_dependencies` gives them.
            seconds: The time limit that a profile would be measured with now; one that was given less, and was not
                settled when that was up, is passed over.
        """
        path = self._path(dependencies)
        if not readable(dependencies) or not path.exists():
            return None
        try:
            entry = _read(path, dependencies)
        except FileFormatError as error:
            warnings.warn(f"A stored profile is passed over, measured again and replaced: {error}", stacklevel=2)
            return None
        return entry.profile if _suffices(entry, seconds) else None

    def put(
        self, dependencies: Mapping[str, Any], profile: LatencyProfile, seconds: float | None = None
    ) -> Path | None:
        """Keeps a profile, in place of one that is not better.

        A profile that is settled is better than one that is not, and of two that are not the one that was given more
        time; None is less than any. Where the better one stays, or the folder cannot be written to, a warning says so.

        Args:
            dependencies: What it was measured under.
            profile: What was measured.
            seconds: The time limit that it was given, None for none.

        Returns:
            The file; None where nothing was written.
        """
        if not readable(dependencies):
            return None
        path = self._path(dependencies)
        try:
            there = _read(path, dependencies) if path.exists() else None
        except FileFormatError:
            there = None
        if there is not None and _rank(there) > _rank(_Entry(profile, seconds)):
            warnings.warn(
                f"The profile in {path} says more (max_seconds={there.seconds}) than the new one "
                f"(max_seconds={seconds}), and stays; give as much time, or delete the file, to replace it.",
                stacklevel=2,
            )
            return None
        document = {
            "format": _FORMAT,
            "version": _VERSION,
            "dependencies": _plain(dependencies),
            "time_limit": seconds,
            "measured": datetime.now().astimezone().isoformat(timespec="seconds"),
            "profile": profile.to_dict(),
        }
        try:
            return write_document(path, document)
        except OSError as error:
            warnings.warn(f"The profile could not be kept in {self.folder}: {error.strerror or error}", stacklevel=2)
            return None

    def _path(self, dependencies: Mapping[str, Any]) -> Path:
        text = json.dumps(_plain(dependencies), sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"


class _Entry(NamedTuple):
    """A profile, and the time limit that it was measured with."""

    profile: LatencyProfile
    seconds: float | None


def _suffices(entry: _Entry, seconds: float | None) -> bool:
    """Whether measuring anew with a time limit would not say more; without one, other counts are measured."""
    if entry.seconds is None or seconds is None:
        return entry.seconds is seconds
    return entry.profile.converged or entry.seconds >= seconds


def _rank(entry: _Entry) -> tuple[bool, float]:
    return (True, 0.0) if entry.profile.converged else (False, -1.0 if entry.seconds is None else entry.seconds)


def _read(path: Path, dependencies: Mapping[str, Any]) -> _Entry:
    """An entry, of these dependencies.

    Raises:
        FileFormatError: If it is damaged, or its profile is of other conditions; names the file.
    """
    document = read_document(path, _FORMAT, _VERSION)
    seconds, told = document.get("time_limit"), document.get("profile")
    if document.get("dependencies") != _plain(dependencies):
        raise FileFormatError(f"{path} was measured under other conditions than its name says.")
    if seconds is not None and (isinstance(seconds, bool) or not isinstance(seconds, int | float)):
        raise FileFormatError(f"{path} must hold a number of seconds or none as `time_limit`, got {seconds!r}.")
    if not isinstance(told, dict):
        raise FileFormatError(f"{path} holds no profile.")
    try:
        profile = LatencyProfile.from_dict(told)
    except FileFormatError as error:
        raise FileFormatError(f"{path} holds no usable profile: {error}") from error
    _check_origin(path, profile, dependencies)
    return _Entry(profile, seconds)


def _check_origin(path: Path, profile: LatencyProfile, dependencies: Mapping[str, Any]) -> None:
    origin = {**profile.context, "depth": profile.depth, "protocol": profile.protocol}
    own: tuple[str, ...] = ("depth", "protocol")
    if profile.protocol == "deployed":  # the paper's drops random tokens, whatever the method
        origin |= {"method": profile.method, "block": profile.block}
        own = (*own, "method", "block")
    for key in (*_TOLD, *own):
        if key in dependencies and origin.get(key) != dependencies[key]:
            raise FileFormatError(
                f"{path} holds a profile of another {key}: {origin.get(key)!r} instead of {dependencies[key]!r}."
            )


def _default_folder() -> Path:
    named = os.environ.get(_FOLDER)
    return Path(named).expanduser() if named else user_cache_path("lightning_prune", appauthor=False)


def _plain(dependencies: Mapping[str, Any]) -> dict[str, Any]:
    """As they come back from a file."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(dependencies)))
    return plain


class CachedProfile(NamedTuple):
    """A profile and where it is from.

    Attributes:
        profile: The latency curve.
        reused: Whether it was measured before, and only read now.
    """

    profile: LatencyProfile
    reused: bool


def get_or_profile(
    model: nn.Module,
    example_inputs: Tensor,
    store: ProfileStore | None,
    *,
    method: Reduction,
    block: int | float = 0.25,
    protocol: Protocol = "deployed",
    time_limit: float | None = 30.0,
    refresh: bool = False,
    target: str | None = None,
    progress: bool = True,
) -> CachedProfile:
    """As `lightning_prune.profile_latency`, unless the store holds a profile of just this; a new one is put there.

    A profile that is too noisy to tell whether anything is gained is not kept: the machine was busy.

    Args:
        model: Any module that contains one Vision Transformer.
        example_inputs: As `profile_latency` takes it.
        store: Where profiles are kept; None measures.
        method: The reduction.
        block: As `profile_latency` takes it.
        protocol: As `profile_latency` takes it.
        time_limit: Time limit of measuring; a stored profile that was given less is not reused, unless it was settled
            before its time was up.
        refresh: Measures anew, and replaces what is stored unless that says more.
        target: Dotted path of the transformer in `model`.
        progress: Shows a bar on a terminal.

    Raises:
        ArgumentError: As `profile_latency`, also where a profile is stored.
        UnsupportedModelError: As `lightning_prune.patch`.
    """
    transformer = find_vision_transformer(model, target)
    check_measurable(transformer, example_inputs, time_limit, protocol)
    dependencies = None
    if store is not None:
        index = reducing_block(method, block, transformer)
        dependencies = profile_dependencies(transformer, example_inputs, method, index, protocol)
        stored = None if refresh else store.get(dependencies, time_limit)
        if stored is not None:
            return CachedProfile(stored, reused=True)
    profile = profile_latency(
        model,
        example_inputs,
        method=method,
        block=block,
        protocol=protocol,
        time_limit=time_limit,
        target=target,
        progress=progress,
    )
    if store is not None and dependencies is not None and not profile.is_inconclusive:
        store.put(dependencies, profile, time_limit)
    return CachedProfile(profile, reused=False)
