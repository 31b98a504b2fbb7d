"""Names with settings as plain data: `tome`, `tome:order=kept`, `torch.compile:mode=blocks`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import yaml

from lightning_prune.errors import ArgumentError

S = TypeVar("S", bound="Spec")


@dataclass(frozen=True, repr=False)
class Spec:
    """A name and the settings that differ from its defaults; immutable, comparable, hashable.

    Attributes:
        name: What the settings belong to.
        settings: Key -> a value that YAML and JSON can hold.

    Raises:
        ArgumentError: If `name` is no text or `settings` no mapping.

    Example:
        >>> from lightning_prune._utils.spec import Spec
        >>> str(Spec("torch.compile", {"mode": "blocks"}))
        'torch.compile:mode=blocks'
        >>> Spec.of("onnxruntime:threads=2,profile=false").settings
        {'threads': 2, 'profile': False}
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ArgumentError(f"`name` must be a name, got {self.name!r}.")
        if not isinstance(self.settings, Mapping):
            raise ArgumentError(f"`settings` must be a mapping from names to values, got {self.settings!r}.")
        object.__setattr__(self, "settings", dict(self.settings))

    def __hash__(self) -> int:
        return hash((self.name, tuple(sorted(self.settings))))

    def __str__(self) -> str:
        settings = ",".join(f"{key}={value}" for key, value in self.settings.items())
        return f"{self.name}:{settings}" if settings else self.name

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    @classmethod
    def of(cls: type[S], value: object, argument: str = "spec") -> S:
        """Reads a spec from itself, from text `name[:key=value,...]`, or from a mapping with `name` and `settings`.

        Values in text are read as YAML reads them: `2`, `0.5` and `true` are a number, a number and a bool.

        Args:
            value: The spec.
            argument: What messages call it.

        Raises:
            ArgumentError: If `value` has none of these forms.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            return cls(*_parse(value, argument))
        if isinstance(value, Mapping) and "name" in value and set(value) <= {"name", "settings"}:
            return cls(**value)
        raise ArgumentError(f"`{argument}` must be a name or `name:key=value,...`, got {value!r}.")

    def to_plain(self) -> str | dict[str, Any]:
        """The name, or a mapping with name and settings where there are some, as YAML and JSON hold them."""
        return {"name": self.name, "settings": dict(self.settings)} if self.settings else self.name


def _parse(text: str, argument: str) -> tuple[str, dict[str, Any]]:
    name, colon, rest = text.partition(":")
    settings: dict[str, Any] = {}
    for part in rest.split(",") if colon else []:
        key, equals, value = part.partition("=")
        key = key.strip()
        if not key or not equals or key in settings:
            raise ArgumentError(f"`{argument}` must be a name or `name:key=value,...`, got {text!r}.")
        try:
            settings[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ArgumentError(f"`{argument}` must give {key!r} a plain value, got {value!r}.") from error
    if not name:
        raise ArgumentError(f"`{argument}` must be a name or `name:key=value,...`, got {text!r}.")
    return name, settings
