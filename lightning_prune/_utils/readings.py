"""Values read from the system, and why one cannot be read. It needs nothing but Python."""

import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SECONDS = 5.0  # for a program that only prints a state


@dataclass(frozen=True)
class NotReadable:
    """A value that could not be read.

    Attributes:
        reason: What was tried, or the error.

    Example:
        >>> from lightning_prune._utils.readings import NotReadable
        >>> print(NotReadable("no /proc/loadavg"))
        not readable: no /proc/loadavg
    """

    reason: str

    def __str__(self) -> str:
        return f"not readable: {self.reason}"


def attempt(read: Callable[[], Any]) -> Any:
    """What a function returns; why it failed if it raises an error, whichever that is.

    Args:
        read: Reads a value, by libraries that may raise anything.

    Example:
        >>> from lightning_prune._utils.readings import attempt
        >>> attempt(lambda: 1 / 0)
        NotReadable(reason='ZeroDivisionError: division by zero')
    """
    try:
        return read()
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no reason given"]
        return NotReadable(f"{type(error).__name__}: {lines[0]}")


def text_of(path: Path) -> str | NotReadable:
    """The text of a file of the system, without white space and zeros around it.

    Args:
        path: The file.
    """
    try:
        return path.read_text(errors="replace").strip("\0 \n\t")
    except FileNotFoundError:
        return NotReadable(f"no {path}")
    except OSError as error:
        return NotReadable(f"{path}: {error.strerror or error}")


def number_of(path: Path) -> int | NotReadable:
    """The whole number in a file of the system.

    Args:
        path: The file.
    """
    text = text_of(path)
    if isinstance(text, NotReadable):
        return text
    try:
        return int(text)
    except ValueError:
        return NotReadable(f"{path} holds {text[:40]!r}, not a number")


def printed_by(words: Sequence[str]) -> str | NotReadable:
    """What a program prints; it may take five seconds.

    Args:
        words: The program and its arguments.
    """
    program = shutil.which(words[0])
    if program is None:
        return NotReadable(f"{words[0]} is not installed")
    try:
        done = subprocess.run([program, *words[1:]], capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return NotReadable(f"{words[0]}: {error}")
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip() or "it printed nothing").splitlines()[0]
        return NotReadable(f"{' '.join(words)} ended with status {done.returncode}: {said}")
    return done.stdout.strip()


def numbered(folder: Path, name: str) -> list[Path]:
    """The entries of a folder that are a name and a number, such as `cpu0`, in order of the number.

    Args:
        folder: It need not exist.
        name: Such as `"cpu"`.
    """
    found = [path for path in folder.glob(f"{name}*") if re.fullmatch(rf"{name}\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix(name)))
