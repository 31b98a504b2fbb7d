"""The further arguments that the user's model passes to its transformer."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

_call_keywords: "WeakKeyDictionary[nn.Module, Mapping[str, Any]]" = WeakKeyDictionary()


def call_keywords(root: nn.Module) -> Mapping[str, Any]:
    """The further arguments that `calling_with` passes to a transformer; empty outside."""
    return _call_keywords.get(root, {})


@contextmanager
def calling_with(root: nn.Module, keywords: Mapping[str, Any]) -> Iterator[None]:
    """Has everything that runs the transformer pass further arguments, as the user's model does.

    Args:
        root: The transformer.
        keywords: Name -> value, such as `interpolate_pos_encoding=True` of Hugging Face models.
    """
    before = _call_keywords.get(root)
    _call_keywords[root] = keywords
    try:
        yield
    finally:
        if before is None:
            del _call_keywords[root]
        else:
            _call_keywords[root] = before
