"""Documents: plain values that are saved as JSON or YAML, and read again without executing anything.

PyYAML is imported for YAML alone, as `lightning_prune.bundle` copies this file to devices that have only numpy.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from lightning_prune._utils.files import atomic_write, user_path
from lightning_prune._utils.validation import check_path
from lightning_prune.errors import ArgumentError, FileFormatError, PruneError

D = TypeVar("D", bound="SavedDocument")


def write_document(path: str | PathLike[str], document: Mapping[str, Any]) -> Path:
    """Writes plain values as JSON if `path` ends in `.json`, else as YAML; returns the path.

    Raises:
        ArgumentError: If an entry has a type that cannot be written; names the entry. An existing file is kept.
        FileWriteError: If the file cannot be written.
    """
    check_path("path", path)
    target = user_path(path)
    dump = _json if target.suffix == ".json" else _yaml
    try:
        text = dump(dict(document))
    except TypeError as error:
        raise ArgumentError(f"{target} can hold plain values only, got {_invalid_entry(document, dump)}.") from error
    with atomic_write(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return target


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def _yaml(value: Any) -> str:
    import yaml

    try:
        text: str = yaml.safe_dump(value, sort_keys=False, default_flow_style=None, width=100)
    except yaml.YAMLError as error:
        raise TypeError(str(error)) from error
    return text


def _read_yaml(text: str) -> Any:
    import yaml

    return yaml.safe_load(text)


def _invalid_entry(value: Any, dump: Callable[[Any], str], path: str = "") -> str:
    """The type of the innermost entry that cannot be dumped, and its path."""
    inner = dict(enumerate(value)) if isinstance(value, list | tuple) else value if isinstance(value, Mapping) else {}
    for key, entry in inner.items():
        try:
            dump(entry)
        except TypeError:
            return _invalid_entry(entry, dump, f"{path}.{key}" if path else str(key))
    return f"{type(value).__name__} for `{path}`"


def read_document(
    path: str | PathLike[str], kind: str | tuple[str, ...], version: int | tuple[int, ...]
) -> dict[str, Any]:
    """Reads what `write_document` wrote and checks its format and version.

    Args:
        path: The file.
        kind: The expected format, or several that are accepted.
        version: The version that can be read, or several.

    Raises:
        ArgumentError: If `path` is not a path.
        FileFormatError: If the file is missing, unreadable or truncated, or has another format or version.
    """
    check_path("path", path)
    source = user_path(path)
    kinds = (kind,) if isinstance(kind, str) else kind
    named = " or ".join(kinds)
    try:
        text = source.read_text(encoding="utf-8")
        document = json.loads(text) if source.suffix == ".json" else _read_yaml(text)
    except OSError as error:
        raise FileFormatError(f"Cannot read {source}: {error.strerror or error}.") from error
    except Exception as error:  # PyYAML raises KeyError, IndexError, RecursionError, ... for damaged files
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
        FORMAT: Name of the format, stored in the document.
        VERSIONS: The versions that can be read, ascending; the last one is written.
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
        """The document as plain values, as written by `save`."""
        return {"format": self.FORMAT, "version": self.VERSIONS[-1], **self._to_values()}

    @classmethod
    def from_dict(cls: type[D], document: Mapping[str, Any]) -> D:
        """The inverse of `to_dict`, also for documents of earlier versions.

        Raises:
            PruneError: If an entry is missing or invalid.
        """
        return cls._from_values(document, document.get("version", cls.VERSIONS[-1]))

    def save(self, path: str | PathLike[str]) -> Path:
        """Writes JSON if `path` ends in `.json`, else YAML; returns the path.

        The file is written completely or not at all.

        Raises:
            ArgumentError: If an entry has a type that cannot be written; names the entry.
            FileWriteError: If the file cannot be written.
        """
        return write_document(path, self.to_dict())


def load_saved(path: str | PathLike[str], *kinds: type[D]) -> D:
    """Reads a file written by `save` of one of the classes, without executing anything in it.

    Raises:
        FileFormatError: If the file cannot be read or has another format; names the file.
    """
    versions = tuple(sorted({version for kind in kinds for version in kind.VERSIONS}))
    document = read_document(path, tuple(kind.FORMAT for kind in kinds), versions)
    kind = next(kind for kind in kinds if document["format"] == kind.FORMAT)
    try:
        return kind.from_dict(document)
    except PruneError as error:
        raise FileFormatError(f"{path} is not a usable {kind.FORMAT} file: {error}") from error
