"""Whether a hook sees the tokens that enter or leave a module."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as _all_modules

_TOOLS = (
    "torch.utils.module_tracker",
    "torch.utils.flop_counter",
    "transformers.utils.output_capturing",  # these do if asked to, which a model's adapter looks at
    "lightning_prune.patching.models.base",  # counts the tokens that enter a block
)
"""Modules whose hooks read no tokens."""


def reads_tokens(module: nn.Module) -> bool:
    """Whether a hook on the module sees the tokens that enter or leave it, or their gradients."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(_read(each) for each in hooks if each)


def any_reads_tokens(modules: Iterable[nn.Module]) -> bool:
    """Whether a hook on one of the modules, also one for all modules, sees the tokens that enter or leave it."""
    for_all = (
        _all_modules._global_forward_hooks,
        _all_modules._global_forward_pre_hooks,
        _all_modules._global_backward_hooks,
        _all_modules._global_backward_pre_hooks,
    )
    if any(_read(each) for each in for_all if each):
        return True
    return any(reads_tokens(each) for each in modules)


def _read(hooks: Mapping[int, Any]) -> bool:
    if torch.compiler.is_dynamo_compiling():  # which cannot trace what follows
        return True
    return any(getattr(hook, "__module__", "") not in _TOOLS for hook in hooks.values())
