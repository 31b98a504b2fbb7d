"""Makes the model that `ImageClassifier(model=...)` names: timm's, Hugging Face's, or one by its import path."""

import difflib
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import timm
import yaml
from torch import nn

import lightning_prune.classification.demo_models  # noqa: F401  the command does not register them on import
from lightning_prune.classification.hugging_face import (
    create_hugging_face,
    is_hugging_face,
    is_hugging_face_name,
    quiet_transformers,
)
from lightning_prune.errors import ArgumentError, PruneError, WeightsError

_PARTS = ("class_path", "init_args", "dict_kwargs")  # of a mapping that names a model
_FORMS = "the name of a timm model, hf:NAME_OR_FOLDER of Hugging Face, or an import path such as my_module.MyModel"


def create_model(
    name: str | Mapping[str, Any],
    pretrained: bool,
    num_classes: int | None,
    kwargs: dict[str, Any],
    weights: str | None = None,
) -> nn.Module:
    """Makes a model by its name.

    Args:
        name: The name of a timm model; `hf:` with a name or a folder of Hugging Face; or the import path of a class or
            function, such as `my_module.MyModel` or `transformers.CLIPVisionModel.from_pretrained`. Or a mapping with
            `class_path` and `init_args`, as configuration files have it.
        pretrained: Whether to load the weights that belong to the name.
        num_classes: Size of the head of a model of timm or Hugging Face; None for its own.
        kwargs: Further arguments of the model.
        weights: A file or folder of weights that will be loaded; for a class of transformers its configuration is read
            from that folder.

    Returns:
        The model.

    Raises:
        ArgumentError: If no model has that name, or it does not take these arguments.
        WeightsError: If the weights that belong to the name cannot be loaded.
    """
    if isinstance(name, str) and name.lstrip().startswith("{"):  # a mapping from a command line
        name = yaml.safe_load(name)
    if isinstance(name, Mapping):
        path = name.get("class_path")
        if not isinstance(path, str):
            raise ArgumentError(f"`model` must be {_FORMS}, or have `class_path` and `init_args`, got {dict(name)!r}.")
        arguments = {key: value for key, value in name.items() if key not in _PARTS}  # as options give them
        for part in _PARTS[1:]:
            arguments |= name.get(part) or {}
        return _from_path(path, {**arguments, **kwargs}, weights)
    if is_hugging_face_name(name):
        return create_hugging_face(name, pretrained, num_classes, kwargs)
    if ":" in name or timm.is_model(name):  # timm resolves "hf-hub:..." and "local-dir:..." itself
        return _from_timm(name, pretrained, num_classes, kwargs)
    if "/" not in name and "\\" not in name and not name.startswith(".") and _module_of(name) is not None:
        return _from_path(name, kwargs, weights)
    raise ArgumentError(f"`model` must be {_FORMS}, got {name!r}.{_hint(name)}")


def _hint(name: str) -> str:
    """What may have been meant by a name that is none."""
    if Path(name).expanduser().exists():
        return f" For a folder of Hugging Face write hf:{name}; a file of weights is given as `weights`."
    if "/" in name:
        return f" For a model of Hugging Face's Hub write hf:{name}, for one of timm on the Hub hf-hub:{name}."
    close = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3)
    return f" Similar: {', '.join(close)}." if close else ""


def _from_timm(name: str, pretrained: bool, num_classes: int | None, kwargs: dict[str, Any]) -> nn.Module:
    if num_classes is not None:
        kwargs = {**kwargs, "num_classes": num_classes}
    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except TypeError as error:
        raise ArgumentError(f"`model_kwargs` must be arguments of {name}, got {sorted(kwargs)}: {error}") from error
    except (OSError, RuntimeError) as error:  # offline, unknown tag, or no weights published for this name
        if not pretrained:
            raise
        reason = str(error).strip().splitlines()[0]
        raise WeightsError(
            f"`model` must be a name that timm can load weights for, got {name!r}: {reason} "
            "Give a local file as `weights`, or `pretrained=False`."
        ) from error


def _module_of(path: str) -> Any:
    """What an import path begins with: the module; None if there is none of that name.

    Errors inside a module that exists are raised, since they are the user's.
    """
    package = path.split(".")[0]
    if "." not in path or not all(part.isidentifier() for part in path.split(".")):
        return None
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        return None


def _from_path(path: str, kwargs: dict[str, Any], weights: str | None) -> nn.Module:
    """Calls the class or function at an import path."""
    made_by = _imported(path)
    label = "`model_kwargs`"
    try:
        if "pretrained_model_name_or_path" in kwargs and hasattr(made_by, "from_pretrained"):
            made_by = made_by.from_pretrained
        elif not kwargs and weights is not None and hasattr(made_by, "config_class"):  # a class of transformers
            label, kwargs = "`weights`", {"config": made_by.config_class.from_pretrained(weights)}
        with quiet_transformers():
            model = made_by(**kwargs)
    except PruneError:  # it names what is wrong
        raise
    except (TypeError, OSError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ArgumentError(
            f"{label} must be arguments of {path}, got {sorted(kwargs) or weights}: {reason}"
        ) from error
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"`model` must be the import path of a module, got {path!r} of type {type(model).__name__}."
        )
    return model.eval() if is_hugging_face(model) else model


def _imported(path: str) -> Any:
    """The object at an import path."""
    parts = path.split(".")
    found: Any = _module_of(path)
    for index, part in enumerate(parts[1:], 1):
        if found is not None and not hasattr(found, part):
            try:
                import_module(".".join(parts[: index + 1]))
            except ModuleNotFoundError:
                found = None
        found = getattr(found, part, None)
    if found is None or not callable(found):
        raise ArgumentError(f"`model` must be {_FORMS}, got {path!r}, which cannot be imported.")
    return found
