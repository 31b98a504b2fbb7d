"""Names with settings as plain data: `tome`, `tome:order=kept`, `torch.compile:mode=blocks`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import yaml

from lightning_prune._utils.validation import check
from lightning_prune.errors import ArgumentError

S = TypeVar("S", bound="Spec")


@dataclass(frozen=True, repr=False)
class Spec:
    """A name with settings; immutable, comparable, hashable.

    Attributes:
        name: The name.
        settings: Key -> value. Settings with default values are left out; values are those that YAML and JSON can hold.

    Raises:
        ArgumentError: If `name` is not a text or `settings` is not a mapping.

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
        check("name", self.name, "a name", isinstance(self.name, str) and bool(self.name))
        check("settings", self.settings, "a mapping from names to values", isinstance(self.settings, Mapping))
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
        """Reads a spec from a spec, from text `name[:key=value,...]`, or from a mapping with `name` and `settings`.

        Values in text are parsed as YAML, so `2` and `0.5` are numbers and `true` is a bool.

        Args:
            value: The spec.
            argument: Name of the argument in error messages.

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
        """The name if there are no settings, else a mapping with `name` and `settings`."""
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
