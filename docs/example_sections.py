"""An extension of Griffe, used by mkdocs.yml: the section `Example:` of a docstring is read as `Examples:`.

The docstrings of this package have `Example:`. Griffe knows the plural only, and would show the singular as a note, in
which the output of an example is read as Markdown.
"""

import re
from typing import Any

import griffe


class ExampleSections(griffe.Extension):
    """Renames the section in every docstring that is loaded."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
