"""Takes the home folder and the name of the user out of what is published."""

import getpass
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning_prune._utils.readings import NotReadable

_USER = "<user>"


def without_names(value: Any) -> Any:
    """The same value, with `~` in place of the home folder, and `<user>` where a path names the user.

    Args:
        value: Text, a number, a reason, or lists and mappings of them.

    Example:
        >>> from pathlib import Path
        >>> from lightning_prune._utils.private_paths import without_names
        >>> without_names({"cache": str(Path.home() / "cache")})
        {'cache': '~/cache'}
    """
    homes, user = _homes(), _user()
    return _cleaned(value, homes, user)


def _cleaned(value: Any, homes: list[str], user: str) -> Any:
    if isinstance(value, str):
        return _clean_text(value, homes, user)
    if isinstance(value, NotReadable):
        return NotReadable(_clean_text(value.reason, homes, user))
    if isinstance(value, Mapping):
        return {key: _cleaned(each, homes, user) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_cleaned(each, homes, user) for each in value]
    return value


def _clean_text(text: str, homes: list[str], user: str) -> str:
    for home in homes:
        text = re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text)
    return re.sub(rf"(?<=[/\\]){re.escape(user)}(?![\w.-])", _USER, text) if user else text


def _homes() -> list[str]:
    """The home folder in its forms, longest first; a root folder is none."""
    forms = {os.environ.get("HOME", ""), os.environ.get("USERPROFILE", "")}
    with suppress(RuntimeError):  # no HOME, and no entry in the user database
        forms |= {str(Path.home()), os.path.realpath(Path.home())}
    forms = {form.rstrip("/\\") for form in forms}
    return sorted((form for form in forms if len(form) > 2), key=len, reverse=True)


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # no such entry
        return ""
