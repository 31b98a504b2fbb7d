"""Small documents on disk, written whole or not at all and read without executing anything, and names for files."""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from lightning_prune.errors import ArgumentError, FileFormatError

_UNFIT = (TypeError, yaml.YAMLError)  # what json and yaml raise at values that they cannot write


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
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


def write_document(path: str | Path, document: Mapping[str, Any]) -> Path:
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


def read_document(path: str | Path, kind: str | tuple[str, ...], version: int) -> dict[str, Any]:
    """Reads what `write_document` wrote and checks that it is of the `kind` (or one of them) and `version` wanted.

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
    if document.get("version") != version:
        came = document.get("version")
        raise FileFormatError(f"{source} is a {found} file of version {came!r}; this release reads version {version}.")
    return document


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
