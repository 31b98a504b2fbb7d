"""Files and folders that are written completely or not at all, and file names."""

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path

from lightning_prune._utils.validation import check_path
from lightning_prune.errors import ArgumentError, FileWriteError


def user_path(path: str | PathLike[str]) -> Path:
    """A path whose leading `~` is the user's home; as it is where there is no home.

    Args:
        path: As a user gives it. A shell leaves the `~` of `--output=~/results` as it is.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:  # no HOME, and no entry in the user database
        return Path(path)


@contextmanager
def naming_file(path: str | PathLike[str]) -> Iterator[None]:
    """A context in which errors of the operating system are raised as errors that name the file that is written.

    Args:
        path: The file or folder that is written.

    Raises:
        FileWriteError: Names `path` and the reason.
    """
    try:
        yield
    except FileWriteError:
        raise
    except OSError as error:
        raise FileWriteError(f"Cannot write {path}: {error.strerror or error}.") from error


@contextmanager
def atomic_write(path: str | PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path in the folder of `path`. The file replaces `path` on success and is deleted on failure.

    The temporary name keeps the suffix, because writers such as matplotlib choose the format by it.

    Raises:
        FileWriteError: If the file cannot be written, for example on a full disk.
    """
    target = user_path(path)
    with naming_file(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.stem}.", suffix=target.suffix)
        os.close(descriptor)
        temporary = Path(name)
        try:
            yield temporary
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)  # mkstemp creates private files
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def staging_folder(folder: str | PathLike[str]) -> Iterator[Path]:
    """Yields a temporary folder in `folder`, for files that are moved there when all of them are written.

    Args:
        folder: Created if it does not exist.

    Raises:
        FileWriteError: If a file cannot be written; names it as it would be named in `folder`.
    """
    target = user_path(folder)
    with naming_file(target):
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target, prefix=".") as name:
            stage = Path(name)
            try:
                yield stage
            except FileWriteError as error:
                raise FileWriteError(str(error).replace(str(stage), str(target))) from error


def ensure_output_dir(output: str | Path) -> Path:
    """Creates the output folder if it does not exist, and checks that it is writable before any work begins.

    Raises:
        ArgumentError: If it cannot be created or written to.
    """
    check_path("output", output)
    folder = user_path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise ArgumentError(f"`output` must be a writable folder, got {folder}: {error}") from error


_KINDS = {
    "results.json": "a comparison",
    "plan.json": "a plan",
    "report.json": "an exported model",
    "bundle.json": "a bundle",
}
"""File that only one kind of results has -> that kind."""


def other_kinds(*own: str) -> dict[str, str]:
    """The files of `output_folder` by which results of other kinds are known.

    Args:
        own: The files that the results to be written may have next to them.
    """
    return {name: kind for name, kind in _KINDS.items() if name not in own}


@contextmanager
def output_folder(output: str | Path, foreign: Mapping[str, str] | None = None) -> Iterator[Path]:
    """A context with the output folder, which is created if need be, and removed again if an error leaves it empty.

    Args:
        output: The folder.
        foreign: File -> whose result it is, such as `{"plan.json": "a plan"}`: results of different kinds in one folder
            would contradict each other.

    Raises:
        ArgumentError: If it cannot be created or written to, or holds a file of `foreign`.
    """
    check_path("output", output)
    folder = user_path(output)
    for name, kind in (foreign or {}).items():
        if (folder / name).exists():
            raise ArgumentError(f"`output` must be a folder without {kind}, got {folder}, which holds {name}.")
    created = [each for each in (folder, *folder.parents) if not each.exists()]
    ensure_output_dir(folder)
    try:
        yield folder
    except BaseException:
        with suppress(OSError):  # a folder with something in it stays, and so do those above it
            for each in created:
                each.rmdir()
        raise


_MAX_BYTES = 180  # file systems allow 255, and temporary names are longer


def slug(variant: str) -> str:
    """Turns the name of a variant into a file name.

    Example:
        >>> from lightning_prune._utils.files import slug
        >>> slug("pomt+int8 1.25x")
        'pomt+int8-1.25x'
    """
    name = re.sub(r"[^\w.+-]+", "-", variant)
    if len(name.encode()) <= _MAX_BYTES:
        return name
    return f"{name[: _MAX_BYTES // 4]}-{hashlib.sha256(variant.encode()).hexdigest()[:12]}"
