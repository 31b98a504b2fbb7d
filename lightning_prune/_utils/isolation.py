"""Running a module without a trace: in evaluation mode, without the user's hooks, and with its buffers put back."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

_LIBRARIES = ("lightning_prune", "torch", "torchao", "timm", "torchvision", "transformers", "peft", "accelerate")
"""Packages whose hooks are a part of the model, as those of parametrised weights or adapters."""

Hooks = dict[int, Callable[..., Any]]

_hooks_read = ContextVar("hooks_read", default=False)


@contextmanager
def hooks_read(are_read: bool) -> Iterator[None]:
    """A context in which the user's hooks on a whole model are a part of it, as a dense head may read tokens by them.

    Args:
        are_read: False changes nothing.
    """
    token = _hooks_read.set(are_read or _hooks_read.get())
    try:
        yield
    finally:
        _hooks_read.reset(token)


def user_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """The forward hooks and forward pre-hooks on a module and its submodules that no library of the model has set."""
    return [hook for hooks in _hook_tables(module.modules()) for hook in hooks.values() if _is_users(hook)]


@contextmanager
def isolated(module: nn.Module, is_whole: bool = True) -> Iterator[None]:
    """Evaluation mode; the user's forward hooks are not called; afterwards flags, hooks and buffers are as before.

    A hook that collects features would otherwise collect those of measurements, in front of those of the run. In
    `hooks_read` the hooks on a whole model are called.

    Args:
        module: The module, with all its submodules.
        is_whole: Whether it is a whole model, and not a part that is tried by itself.
    """
    modules = list(module.modules())
    flags = [(each, each.training) for each in modules]
    tables: list[tuple[Hooks, Hooks]] = []
    if not (is_whole and _hooks_read.get()):
        tables = [(hooks, dict(hooks)) for hooks in _hook_tables(modules) if any(map(_is_users, hooks.values()))]
    buffers = [
        (each._buffers, name, value, value.detach().clone())
        for each in modules
        for name, value in each._buffers.items()
        if value is not None
    ]
    try:
        module.eval()
        for hooks, before in tables:
            for key, hook in before.items():
                if _is_users(hook):
                    del hooks[key]
        yield
    finally:
        for each, flag in flags:
            each.training = flag
        for hooks, before in tables:
            added = {key: hook for key, hook in hooks.items() if key not in before}
            hooks.clear()
            hooks.update({**before, **added})
        for owner, name, value, content in buffers:
            _put_back(owner, name, value, content)


def _put_back(owner: dict[str, Tensor | None], name: str, value: Tensor, content: Tensor) -> None:
    owner[name] = value
    try:
        same = torch.equal(value, content)
    except RuntimeError:  # a tensor without data, or of a kind that cannot be compared
        return
    if not same:
        with torch.no_grad():
            value.copy_(content)


def _hook_tables(modules: Iterable[nn.Module]) -> Iterator[Hooks]:
    for each in modules:
        yield each._forward_hooks
        yield each._forward_pre_hooks


def _is_users(hook: Callable[..., Any]) -> bool:
    return (getattr(hook, "__module__", "") or "").partition(".")[0] not in _LIBRARIES
