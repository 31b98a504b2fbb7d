"""`patch`: makes the Vision Transformer in a model remove tokens."""

import warnings
from pathlib import Path
from typing import TypeGuard

from torch import nn

from lightning_prune._utils.files import user_path
from lightning_prune._utils.validation import as_int, check
from lightning_prune.errors import ArgumentError
from lightning_prune.patching.exact_tail import EXACT
from lightning_prune.patching.models import VisionTransformer, find_vision_transformer
from lightning_prune.patching.patch_handle import PatchHandle
from lightning_prune.patching.schedule_forms import reductions_of, resolve_schedule
from lightning_prune.patching.token_readers import RestoreMode
from lightning_prune.reduction import Reduction, names, resolve
from lightning_prune.schedule import MethodSpec, ScheduleLike, read_schedule


def patch(
    model: nn.Module,
    method: str | MethodSpec | Reduction | ScheduleLike,
    schedule: ScheduleLike | None = None,
    *,
    block: int | float = 0.25,
    module_path: str | None = None,
    tail: bool | None = None,
    restore: RestoreMode | None = None,
) -> PatchHandle:
    """Makes the Vision Transformer in `model` remove tokens by a schedule, in place.

    Blocks that reduce get a subclass of their own class, as do later blocks that need to know which tokens are left;
    all others run their own code. Parameters, buffers, `state_dict` keys and hooks stay as they are; the model
    deep-copies, pickles, compiles with `fullgraph=True` and exports. Patching a patched model replaces the patch.

    Where the head reads prefix tokens only, patch tokens, which nothing reads, also leave the last block before its
    MLP: the exact tail, which changes outputs by rounding only. `patch(model, "exact")` gives a model that alone. It is
    in force while `forward` of the transformer runs, unless that returns hidden states, or a hook sees them: then all
    tokens come out, as they do from `forward_features`. What the schedule removes in the last block leaves with them.

    Dense heads read a grid of patch tokens, after the blocks or between them. With `restore`, whoever reads the output
    of a block gets all N tokens, and between the outputs that are read the sequence stays short: `forward_features`,
    `forward_intermediates` and `get_intermediate_layers` of timm, `last_hidden_state`, `hidden_states` and backbones of
    Hugging Face, hooks on blocks, and code that calls the blocks itself.

    A schedule that says on which device and at which batch size it was made is used elsewhere with a warning at the
    first batch, except in compiled graphs, which cannot warn.

    Args:
        model: Any module that contains one Vision Transformer.
        method: Name of a reduction (`"pomt"`, `"tome"`, `"topk"`, ...), with settings if need be
            (`"tome:proportional_attention=false"`), or a `lightning_prune.reduction.Reduction`. Left out where the
            schedule names its method: `patch(model, plan)`, `patch(model, "schedule.yaml")`. `"exact"` for the exact
            tail without a method, and without a schedule.
        schedule: Tokens that each block removes (a `Schedule` or a list), `KeepRates`, which fit images of any size,
            a `Plan`, the path of a saved one, a number of tokens removed in all, or the share of patch tokens that are
            left at the end. None for methods whose token count depends on the image (`VWTInter`).
        block: Where methods that reduce once do so if `schedule` is a number: an index, or a fraction of the depth.
        module_path: Dotted path of the transformer in `model`, needed where there are several.
        tail: Whether the model has the exact tail, if tokens are removed. None where the outputs stay what they are;
            True also where the model returns tokens (base models of Hugging Face), which then are prefix tokens only:
            `pooler_output` stays what it is, `last_hidden_state` has P tokens. False nowhere.
        restore: How removed tokens are given back: `"copy"`, each takes the token that it went into (its nearest kept
            one, if it was dropped); `"delta"`, each keeps its own state at the cut and takes the mean change of the 10
            kept tokens nearest to it there; `"auto"`, by copies where the method merges tokens, else by changes. None
            not at all.

    Returns:
        A handle. `handle.remove()` restores the model to the bit; it is also a context manager that does so.

    Raises:
        UnsupportedModelError: If no supported transformer is found, or several and no `module_path`; or the exact tail
            is asked for and this model can have none, which says why.
        ScheduleError: If the schedule is for another depth or token count, or asks a block for more tokens than it
            can remove; names the numbers. Where images decide the token count, in forward.
        ArgumentError: If `method` or `module_path` is unknown, or `method` is not the one that the schedule names.
        FileFormatError: If a file cannot be read or holds no schedule.

    Example:
        >>> import timm
        >>> import torch
        >>> import lightning_prune as lp
        >>> model = timm.create_model("vit_tiny_patch16_224").eval()
        >>> with lp.patch(model, "pomt", lp.Schedule.single(depth=12, block=3, remove=56)):
        ...     logits = model(torch.randn(1, 3, 224, 224))
        >>> handle = lp.patch(model, "tome", 0.7)
        >>> handle.schedule.schedule(197).tokens(197)[-1]
        139
    """
    transformer = find_vision_transformer(model, module_path, restore)
    handle = make_handle(transformer, method, schedule, block, warns=True, tail=tail)
    _warn_of_restore(handle)
    return handle


def make_handle(
    transformer: VisionTransformer,
    method: str | MethodSpec | Reduction | ScheduleLike,
    schedule: ScheduleLike | None = None,
    block: int | float = 0.25,
    warns: bool = False,
    tail: bool | None = None,
) -> PatchHandle:
    """Patches a transformer that was found, with the arguments of `patch`.

    Args:
        transformer: The Vision Transformer.
        method: See `patch`.
        schedule: See `patch`.
        block: See `patch`.
        warns: Whether a schedule that was made elsewhere leads to a warning.
        tail: See `patch`.

    Raises:
        ArgumentError, FileFormatError, ScheduleError, UnsupportedModelError: As `patch`.
    """
    index = as_int(block)
    is_place = (index is not None and index >= 0) or (isinstance(block, float) and 0 <= block < 1)
    check("block", block, "an index >= 0 or a fraction of the depth in [0, 1)", is_place)
    check("tail", tail, "True, False or None", tail is None or isinstance(tail, bool))
    if isinstance(method, str) and method == EXACT:
        check("tail", tail, "left out with 'exact', or True", tail is not False)
        return PatchHandle(transformer, None, schedule, warns, tail, exact=True)
    if schedule is None and _is_schedule(method):
        schedule = read_schedule(method, "method")
        if isinstance(schedule, int | float):
            raise ArgumentError(f"`method` must be a method, or a schedule that names one, got {method!r}.")
        named = reductions_of(schedule)
        if not isinstance(named, Reduction):
            return PatchHandle(transformer, None, schedule, warns, tail)
        method = named
    if not isinstance(method, str | MethodSpec | Reduction):
        raise ArgumentError(f"`method` must be a method's name, a MethodSpec or a Reduction, got {method!r}.")
    reduction = resolve(method)
    if schedule is not None and not reduction.adaptive:
        schedule = resolve_schedule(schedule, transformer, reduction, block)
    return PatchHandle(transformer, reduction, schedule, warns, tail)


def _warn_of_restore(handle: PatchHandle) -> None:
    """Warns where a schedule was planned for a model that gets its tokens back, and this one does not."""
    made_on = None if handle.schedule is None else handle.schedule.made_on
    planned = made_on.details.get("restore") if made_on is not None else None
    if planned is not None and handle.transformer.restore is None:
        warnings.warn(
            f"The schedule was planned with restore={planned!r}, and the model is patched without: whoever reads its "
            "tokens gets fewer of them.",
            stacklevel=3,
        )


def _is_schedule(value: str | MethodSpec | Reduction | ScheduleLike) -> TypeGuard[ScheduleLike]:
    """Whether `value` is a schedule, or the path of one, and not a method."""
    if isinstance(value, str):
        is_document = Path(value).suffix in (".yaml", ".yml", ".json")
        return is_document or (":" not in value and value not in names() and user_path(value).is_file())
    return not isinstance(value, MethodSpec | Reduction)
