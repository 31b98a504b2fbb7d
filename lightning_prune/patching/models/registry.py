"""Finds the Vision Transformer in a model. To add a model family, add its adapter to `MODEL_ADAPTERS`."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace

from torch import nn

from lightning_prune._utils.isolation import hooks_read
from lightning_prune._utils.validation import check
from lightning_prune.errors import ArgumentError, UnsupportedModelError
from lightning_prune.patching.class_swap import original_class
from lightning_prune.patching.models.base import ModelAdapter, VisionTransformer
from lightning_prune.patching.models.huggingface_blip import HuggingFaceBlip
from lightning_prune.patching.models.huggingface_families import (
    HuggingFaceCLIP,
    HuggingFaceDinov2,
    HuggingFaceDinov3,
    HuggingFaceSigLIP,
    HuggingFaceViT,
)
from lightning_prune.patching.models.openclip import OpenCLIPVisionTransformer
from lightning_prune.patching.models.timm_grid import TimmDeepseek, TimmGemma, TimmQwen
from lightning_prune.patching.models.timm_positions import TimmEva, TimmNaFlex, TimmRelPos
from lightning_prune.patching.models.timm_unfused import TimmCait, TimmConVit
from lightning_prune.patching.models.timm_vit import TimmVisionTransformer
from lightning_prune.patching.models.torchvision_vit import TorchvisionVisionTransformer
from lightning_prune.patching.models.unsupported import unsupported_reason
from lightning_prune.patching.token_readers import RestoreMode, check_restore

_restore: ContextVar[RestoreMode | None] = ContextVar("restore", default=None)

MODEL_ADAPTERS: tuple[ModelAdapter, ...] = (
    TimmVisionTransformer(),
    TimmEva(),
    TimmNaFlex(),
    TimmRelPos(),
    TimmCait(),
    TimmConVit(),
    TimmQwen(),
    TimmDeepseek(),
    TimmGemma(),
    TorchvisionVisionTransformer(),
    OpenCLIPVisionTransformer(),
    HuggingFaceViT(),
    HuggingFaceDinov2(),
    HuggingFaceDinov3(),
    HuggingFaceCLIP(),
    HuggingFaceSigLIP(),
    HuggingFaceBlip(),
)


def find_vision_transformer(
    model: nn.Module, module_path: str | None = None, restore: RestoreMode | None = None
) -> VisionTransformer:
    """Finds the Vision Transformer in `model`: the model itself or one of its submodules.

    Args:
        model: Any module.
        module_path: Dotted path of the transformer in `model`; required if there are several.
        restore: How removed tokens are to be given back, as of `lightning_prune.patch`; that of `restoring` if None.
            The outermost module of `model` around the transformer that has a `forward` is then the reader; a
            transformer that returns tokens or a grid reads itself.

    Raises:
        UnsupportedModelError: If there is none, or if there are several and `module_path` is None (lists them); or if
            it runs with `restore` only, and that is None.
        ArgumentError: If `module_path` is not the path of a module.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
    check_restore(restore)
    restore = restore or _restore.get()
    whole = model
    if module_path is not None:
        check("module_path", module_path, "a dotted path or None", isinstance(module_path, str))
        modules = dict(model.named_modules())
        if module_path not in modules:
            raise ArgumentError(
                f"`module_path` must be the dotted path of a module in {type(model).__name__}, got {module_path!r}."
            )
        model, prefix = modules[module_path], module_path
    else:
        prefix = ""
    found: list[tuple[str, nn.Module, ModelAdapter]] = []
    adapters: dict[type, ModelAdapter | None] = {}  # of each class: a model has many modules of few classes
    for path, module in model.named_modules(prefix=prefix):
        kind = type(module)
        if kind not in adapters:
            adapters[kind] = next((adapter for adapter in MODEL_ADAPTERS if adapter.matches(module)), None)
        adapter = adapters[kind]
        inside = any(path.startswith(f"{outer}." if outer else "") for outer, _, _ in found)
        if adapter is not None and not inside:
            found.append((path, module, adapter))
    if not found:
        for path, module in model.named_modules(prefix=prefix):
            reason = unsupported_reason(type(module))
            if reason is not None:
                at = f" at {path!r}" if path else ""
                raise UnsupportedModelError(f"{type(module).__name__}{at} cannot be pruned: {reason}.")
        supported = ", ".join(adapter.name for adapter in MODEL_ADAPTERS)
        raise UnsupportedModelError(f"`model` must contain one of {supported}, got {_contents(model)}.")
    if len(found) > 1 and restore is None:  # those that need it are no candidates without
        found = [each for each in found if each[2].restore_reason(each[1]) is None] or found
    if len(found) > 1:
        candidates = ", ".join(f"{path!r} ({original_class(module).__name__})" for path, module, _ in found)
        raise UnsupportedModelError(
            f"`module_path` must be one of {candidates}, because the model contains {len(found)} Vision Transformers, "
            "got None."
        )
    path, root, adapter = found[0]
    reason = adapter.restore_reason(root)
    if reason is not None and restore is None:
        at = f" at {path!r}" if path else ""
        raise UnsupportedModelError(
            f"{original_class(root).__name__}{at} cannot be pruned: {reason}. Pass `restore='auto'`, which gives "
            "removed tokens back."
        )
    reader = _reader(whole, path, restore is not None)
    if restore is not None and reader is None and (adapter.returns_tokens(root) or reason is not None):
        reader = root
    called = root if reader is None else reader
    compiled = next((m for m in whole.modules() if m is not called and getattr(m, "_orig_mod", None) is called), None)
    found_as = replace(describe(adapter, root, path), compiled_wrapper=compiled, restore=restore, reader=reader)
    if reader is None:
        return found_as
    if _is_classifier(reader):
        return replace(found_as, num_classes=int(getattr(reader, "num_classes", 0)), reads_logits=True)
    return replace(found_as, num_classes=0)  # what it returns is no row of logits for each image


@contextmanager
def restoring(restore: RestoreMode | None) -> Iterator[None]:
    """A context in which transformers that are found give removed tokens back, unless another mode is asked for.

    The user's hooks are then a part of the model: a dense head may read tokens by them.

    Args:
        restore: As of `lightning_prune.patch`; None changes nothing.
    """
    token = _restore.set(restore or _restore.get())
    try:
        with hooks_read(restore is not None):
            yield
    finally:
        _restore.reset(token)


def _reader(model: nn.Module, path: str, restores: bool) -> nn.Module | None:
    """The module around the transformer that is measured and judged in its place; None for the transformer.

    A classifier around a tower, which says so; where tokens are given back, the outermost that has a forward of its
    own.
    """
    names = path.split(".") if path else []
    around = [model.get_submodule(".".join(names[:count])) for count in range(len(names))]
    classifier = next((module for module in around if _is_classifier(module)), None)
    if classifier is not None or not restores:
        return classifier
    for module in around:
        forward = original_class(module).forward
        # Containers have none, and that of a LightningModule calls that of its base class.
        if forward is not nn.Module.forward and not forward.__module__.startswith(("lightning.", "pytorch_lightning.")):
            return module
    return None


def _is_classifier(module: nn.Module) -> bool:
    return bool(getattr(type(module), "classifies_by_tower", False))


def describe(adapter: ModelAdapter, root: nn.Module, path: str) -> VisionTransformer:
    """Describes a root by its adapter; blocks wrapped by `torch.compile` are unwrapped.

    Raises:
        UnsupportedModelError: If it cannot be pruned.
    """
    description = adapter.describe(root, path)
    blocks = tuple(getattr(block, "_orig_mod", block) for block in description.blocks)
    if len(set(blocks)) < len(blocks):
        raise UnsupportedModelError("The blocks must be different modules, got one module at several depths.")
    return replace(description, blocks=blocks)


def _contents(model: nn.Module) -> str:
    """The class of the model and those of its children."""
    children = sorted({type(child).__name__ for child in model.children()})
    return f"{type(model).__name__} with {', '.join(children[:8]) or 'no modules'}"
