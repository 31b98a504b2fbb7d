"""A folder of measurements: one JSON file for each set of conditions, found again under exactly these."""

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from lightning_prune._utils.documents import read_document, write_document
from lightning_prune.errors import FileFormatError, FileWriteError
from lightning_prune.profiling.environment import unknown_conditions

_FOLDER_VARIABLE = "LIGHTNING_PRUNE_CACHE"


class StoreFolder:
    """A folder of measurements. Entries are written whole or not at all, so several processes can share it.

    Args:
        folder: The folder; a leading `~` is the user's home. None takes the environment variable LIGHTNING_PRUNE_CACHE
            or else the user's cache folder (`~/.cache/lightning_prune` on Linux, `~/Library/Caches/lightning_prune` on
            macOS).
        kind: Format of the documents.
        version: Version of the documents that is written and can be read.
        what: What is kept there, in the plural and the singular, for warnings.

    Attributes:
        path: The folder; None where there is no home, which a warning says.
    """

    def __init__(self, folder: str | Path | None, kind: str, version: int, what: tuple[str, str]) -> None:
        self._kind, self._version, (self._plural, self._singular) = kind, version, what
        self.path: Path | None = None
        try:
            self.path = Path(folder).expanduser() if folder is not None else default_folder()
        except RuntimeError as error:  # no HOME, and no entry in the user database
            warnings.warn(f"{self._plural.capitalize()} are not kept: {error}", stacklevel=4)

    def file(self, dependencies: Mapping[str, Any], prefix: str = "") -> Path | None:
        """The file of a set of conditions, whether it exists or not; None where nothing can be kept under them.

        Args:
            dependencies: The conditions, as plain values.
            prefix: Begins the name of the file.
        """
        if self.path is None or unknown_conditions(dependencies):
            return None
        text = json.dumps(plain_values(dependencies), sort_keys=True)
        return self.path / f"{prefix}{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"

    def load(self, file: Path, dependencies: Mapping[str, Any]) -> dict[str, Any] | None:
        """The document of a set of conditions; None where there is none.

        Args:
            file: As `file` returns it.
            dependencies: The conditions.

        Raises:
            FileFormatError: If it is damaged, or of other conditions; names the file.
            OSError: If the folder cannot be searched.
        """
        if not file.exists():
            return None
        document = read_document(file, self._kind, self._version)
        if document.get("dependencies") != plain_values(dependencies):
            raise FileFormatError(f"{file} must be of the conditions of its name, got others.")
        return document

    def save(self, file: Path, dependencies: Mapping[str, Any], values: Mapping[str, Any]) -> Path | None:
        """Writes a document; None where it cannot be written, which a warning says.

        Args:
            file: As `file` returns it.
            dependencies: The conditions.
            values: The document, without format, version and conditions.
        """
        head = {"format": self._kind, "version": self._version, "dependencies": plain_values(dependencies)}
        try:
            return write_document(file, {**head, **values})
        except FileWriteError as error:
            warnings.warn(f"The {self._singular} is not kept for other runs: {error}", stacklevel=3)
            return None

    def warn_unreadable(self, error: FileFormatError | OSError) -> None:
        """Says why what is kept is not used.

        Args:
            error: As `load` raises it.
        """
        if isinstance(error, FileFormatError):
            text = f"A kept {self._singular} is skipped and will be measured again and replaced: {error}"
        else:  # a home that belongs to another user, for example
            text = f"Kept {self._plural} cannot be read in {self.path}: {error.strerror or error}"
        warnings.warn(text, stacklevel=3)


def plain_values(dependencies: Mapping[str, Any]) -> dict[str, Any]:
    """The conditions as they come back from a file.

    Args:
        dependencies: The conditions.
    """
    plain: dict[str, Any] = json.loads(json.dumps(dict(dependencies)))
    return plain


def default_folder() -> Path:
    """The folder where none is given: that of LIGHTNING_PRUNE_CACHE, or else the user's cache folder.

    Raises:
        RuntimeError: If there is no home.
    """
    named = os.environ.get(_FOLDER_VARIABLE)
    return Path(named).expanduser() if named else user_cache_path("lightning_prune", appauthor=False)
