"""Variants as names of files."""

import re


def slug(variant: str) -> str:
    """A variant's name as that of a file.

    Example:
        >>> from lightning_prune.comparing.slug import slug
        >>> slug("pomt+int8 1.25x")
        'pomt+int8-1.25x'
    """
    return re.sub(r"[^\w.+-]+", "-", variant)
