"""Variants as names of files."""

import hashlib
import re

_LONGEST = 180  # bytes; file systems take 255, and temporary names are longer


def slug(variant: str) -> str:
    """A variant's name as that of a file.

    Example:
        >>> from lightning_prune.comparing.slug import slug
        >>> slug("pomt+int8 1.25x")
        'pomt+int8-1.25x'
    """
    name = re.sub(r"[^\w.+-]+", "-", variant)
    if len(name.encode()) <= _LONGEST:
        return name
    return f"{name[: _LONGEST // 4]}-{hashlib.sha256(variant.encode()).hexdigest()[:12]}"
