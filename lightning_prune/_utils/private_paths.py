"""Takes the home folder and the names of users and of the machine out of what is published."""

import getpass
import os
import platform
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_prune._utils.readings import NotReadable

_USER = "<user>"
_HOST = "<host>"
_WINDOWS = re.compile(r"\\|(?<![^\W_])[A-Za-z]:/")  # paths there do not tell upper from lower case
_SEPARATOR = r"[\\/]+"
_BEFORE_WORD, _AFTER_WORD = r"(?<![^\W_])", r"(?![^\W_])"  # "_" and "-" divide words
# The name after /home/ and the like; on Windows it may hold spaces, and ends at the next backslash.
_IN_HOMES = r"""([\\/](?:home|Users)[\\/]+)(?:[^/\\:;,"\n]*[^/\\:;,"\s](?=\\)|[^/\\\s:;,'"()]+)"""


@dataclass(frozen=True)
class _Names:
    homes: tuple[str, ...]
    user: str
    hosts: tuple[str, ...]


def without_names(value: Any) -> Any:
    r"""The same value, with `~` in place of the home folder, and without the names of users and of the machine.

    In paths, `<user>` stands for the name of the user, and for that of any account after `/home/`, `/Users/` and
    `\Users\`; `<host>` stands for the name of the machine, in any text.

    Args:
        value: Text, a number, a reason, or lists and mappings of them; names in mappings stay.

    Example:
        >>> from pathlib import Path
        >>> from lightning_prune._utils.private_paths import without_names
        >>> without_names({"cache": str(Path.home() / "cache")})
        {'cache': '~/cache'}
    """
    return _cleaned(value, _Names(_homes(), _user(), _hosts()))


def _cleaned(value: Any, names: _Names) -> Any:
    if isinstance(value, str):
        return _clean_text(value, names)
    if isinstance(value, NotReadable):
        return NotReadable(_clean_text(value.reason, names))
    if isinstance(value, Mapping):
        return {key: _cleaned(each, names) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_cleaned(each, names) for each in value]
    return value


def _clean_text(text: str, names: _Names) -> str:
    flags = re.IGNORECASE if _WINDOWS.search(text) else re.NOFLAG
    for home in names.homes:
        text = re.sub(_home_pattern(home), "~", text, flags=flags)
    if names.user:  # anywhere in a part of a path, such as /tmp/cache_alice
        pattern = rf"([/\\~](?:[^/\\\s]*[^/\\\sA-Za-z0-9])?){re.escape(names.user)}{_AFTER_WORD}"
        text = re.sub(pattern, rf"\1{_USER}", text, flags=flags)
    text = re.sub(_IN_HOMES, rf"\1{_USER}", text, flags=flags)
    for host in names.hosts:
        text = re.sub(rf"{_BEFORE_WORD}{re.escape(host)}{_AFTER_WORD}", _HOST, text)
    return text


def _home_pattern(home: str) -> str:
    """A home where it is the start of a path and ends with a part of it; separators may be doubled, as in a `repr`."""
    path = _SEPARATOR.join(re.escape(part) for part in re.split(_SEPARATOR, home))
    return rf"(?<![\w.~/\\-]){path}(?![\w-]|\.\w)"


def _homes() -> tuple[str, ...]:
    """The home folder in its forms, longest first; a root folder is none."""
    forms = {os.environ.get("HOME", ""), os.environ.get("USERPROFILE", "")}
    with suppress(RuntimeError):  # no HOME, and no entry in the user database
        forms |= {str(Path.home()), os.path.realpath(Path.home())}
    forms = {form.rstrip("/\\") for form in forms}
    return tuple(sorted((form for form in forms if len(form) > 2), key=len, reverse=True))


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # no such entry
        return ""


def _hosts() -> tuple[str, ...]:
    """The name of the machine with its domain, and without it; `localhost` names none."""
    name = platform.node()
    return tuple(each for each in dict.fromkeys((name, name.partition(".")[0])) if each not in ("", "localhost"))
