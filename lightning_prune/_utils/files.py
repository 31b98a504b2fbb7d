"""Small documents on disk, written whole or not at all and read without executing anything, and names for files."""

import hashlib
import json
import os
import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml

from lightning_prune.errors import ArgumentError, FileFormatError, PruneError

D = TypeVar("D", bound="SavedDocument")
_UNFIT = (TypeError, yaml.YAMLError)  # what json and yaml raise at values that they cannot write


@contextmanager
def atomic_write(path: str | PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path` that takes its place when the block ends well, and vanishes otherwise.

    The temporary name keeps the suffix, from which writers such as matplotlib choose the format.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.stem}.", suffix=target.suffix)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes private files; these are for sharing
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def write_document(path: str | PathLike[str], document: Mapping[str, Any]) -> Path:
    """Writes plain values as JSON where `path` ends in `.json` and as YAML elsewhere; returns the path.

    Raises:
        ArgumentError: If an entry is of a type that such a file cannot hold; names it. An old file stays.
    """
    target = Path(path)
    dump = _json if target.suffix == ".json" else _yaml
    try:
        text = dump(dict(document))
    except _UNFIT as error:
        raise ArgumentError(f"{target} can hold plain values only, got {_culprit(document, dump)}.") from error
    with atomic_write(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return target


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, default_flow_style=None, width=100)


def _culprit(value: Any, dump: Callable[[Any], str], place: str = "") -> str:
    """The type of the innermost entry that cannot be dumped, and its place."""
    inner = dict(enumerate(value)) if isinstance(value, list | tuple) else value if isinstance(value, Mapping) else {}
    for key, entry in inner.items():
        try:
            dump(entry)
        except _UNFIT:
            return _culprit(entry, dump, f"{place}.{key}" if place else str(key))
    return f"{type(value).__name__} for `{place}`"


def read_document(
    path: str | PathLike[str], kind: str | tuple[str, ...], version: int | tuple[int, ...]
) -> dict[str, Any]:
    """Reads what `write_document` wrote and checks its format and version.

    Args:
        path: The file.
        kind: The format, or several of which it may be any.
        version: The version that can be read, or several.

    Raises:
        FileFormatError: If the file is missing, unreadable, truncated, of another kind or of a newer version.
    """
    source = Path(path)
    kinds = (kind,) if isinstance(kind, str) else kind
    named = " or ".join(kinds)
    try:
        text = source.read_text(encoding="utf-8")
        document = json.loads(text) if source.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise FileFormatError(f"Cannot read {source}: {error.strerror or error}.") from error
    except Exception as error:  # of damage PyYAML makes KeyError, IndexError, RecursionError, ...
        reason = " ".join(str(error).split())
        raise FileFormatError(f"{source} is damaged or not a {named} file: {reason}") from error
    found = document.get("format") if isinstance(document, dict) else None
    if found not in kinds:
        what = f"format {found!r}" if found else "no format entry"
        raise FileFormatError(f"{source} is not a {named} file: it has {what}.")
    versions = (version,) if isinstance(version, int) else version
    if document.get("version") not in versions:
        readable = " and ".join(map(str, versions))
        raise FileFormatError(
            f"{source} is a {found} file of version {document.get('version')!r}; this release reads version {readable}."
        )
    return document


class SavedDocument(ABC):
    """Base of classes that can be saved as YAML or JSON and loaded again: plain values with a format and a version.

    A subclass converts itself to plain values and back; `load_saved` reads it from a file.

    Attributes:
        FORMAT: The format that the document names.
        VERSIONS: The versions that can be read, ascending; the last is written.
    """

    FORMAT: ClassVar[str]
    VERSIONS: ClassVar[tuple[int, ...]] = (1,)

    @abstractmethod
    def _to_values(self) -> dict[str, Any]:
        """The entries without format and version, as plain values."""

    @classmethod
    @abstractmethod
    def _from_values(cls: type[D], values: Mapping[str, Any], version: int) -> D:
        """The inverse of `_to_values`, also for earlier versions. Raises a PruneError if the values are invalid."""

    def to_dict(self) -> dict[str, Any]:
        """The document as plain values, as `save` writes them."""
        return {"format": self.FORMAT, "version": self.VERSIONS[-1], **self._to_values()}

    @classmethod
    def from_dict(cls: type[D], document: Mapping[str, Any]) -> D:
        """The inverse of `to_dict`, also of documents of earlier versions.

        Raises:
            PruneError: If an entry is missing or unusable.
        """
        return cls._from_values(document, document.get("version", cls.VERSIONS[-1]))

    def save(self, path: str | PathLike[str]) -> Path:
        """Writes JSON where `path` ends in `.json` and YAML elsewhere; returns the path.

        The file appears whole or not at all.

        Raises:
            ArgumentError: If an entry cannot be held by such a file; names it.
        """
        return write_document(path, self.to_dict())


def load_saved(path: str | PathLike[str], *kinds: type[D]) -> D:
    """Reads a file that `save` of one of the classes wrote, without executing anything in it.

    Raises:
        FileFormatError: If the file cannot be read or is of another kind; names the file.
    """
    versions = tuple(sorted({version for kind in kinds for version in kind.VERSIONS}))
    document = read_document(path, tuple(kind.FORMAT for kind in kinds), versions)
    kind = next(kind for kind in kinds if document["format"] == kind.FORMAT)
    try:
        return kind.from_dict(document)
    except PruneError as error:
        raise FileFormatError(f"{path} is not a usable {kind.FORMAT} file: {error}") from error


def ensure_output_dir(output: str | Path) -> Path:
    """The output folder, made if need be, checked before hours of work rather than after.

    Raises:
        ArgumentError: If it cannot be made or written to.
    """
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise ArgumentError(f"`output` must be a folder that can be written to, got {folder}: {error}") from error


_LONGEST = 180  # bytes; file systems take 255, and temporary names are longer


def slug(variant: str) -> str:
    """A variant's name as that of a file.

    Example:
        >>> from lightning_prune._utils.files import slug
        >>> slug("pomt+int8 1.25x")
        'pomt+int8-1.25x'
    """
    name = re.sub(r"[^\w.+-]+", "-", variant)
    if len(name.encode()) <= _LONGEST:
        return name
    return f"{name[: _LONGEST // 4]}-{hashlib.sha256(variant.encode()).hexdigest()[:12]}"
