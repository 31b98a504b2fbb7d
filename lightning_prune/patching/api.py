"""Opening a model's blocks to a reduction, and closing them again."""

import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TypeGuard
from weakref import WeakKeyDictionary

from torch import nn

from lightning_prune.errors import ArgumentError, ScheduleError, UnsupportedModelError
from lightning_prune.patching.attention_capture import CaptureSlot
from lightning_prune.patching.block_split import AttnMlpSplit, verify_split
from lightning_prune.patching.class_swap import PatchedModule, RootPatch, is_patched_module, restore_class, swap_class
from lightning_prune.patching.compatibility import check_reduction, check_schedule
from lightning_prune.patching.models import VisionTransformer, describe, find_vision_transformer
from lightning_prune.patching.patched_block import (
    BlockPatch,
    CaptureInput,
    InputCapture,
    PatchedBlock,
)
from lightning_prune.patching.schedule_forms import reductions_of, resolve_schedule
from lightning_prune.reduction import Reduction, resolve
from lightning_prune.schedule import KeepRates, MethodSpec, Rate, Schedule, ScheduleLike, read_schedule

_log = logging.getLogger(__name__)
# Model -> classes of blocks for which the warning was given: a search patches hundreds of times.
_warned_cut_after: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def patch(
    model: nn.Module,
    method: str | MethodSpec | Reduction | ScheduleLike,
    schedule: ScheduleLike | None = None,
    *,
    block: int | float = 0.25,
    module_path: str | None = None,
) -> "PatchHandle":
    """Makes the Vision Transformer in `model` remove tokens by a schedule, in place.

    Only blocks that reduce are touched, by a subclass put over their own class: all others run their own code with
    fused attention. Parameters, buffers, `state_dict` keys and hooks stay as they are; the model deep-copies, pickles,
    compiles with `fullgraph=True` and exports. Patching a patched model replaces the patch.

    A schedule that says on which device and at which batch size it was made is used elsewhere with a warning, at the
    first batch that a block sees (not in a compiled graph, which has no place for one).

    Args:
        model: Any module that contains one Vision Transformer.
        method: Name of a reduction (`"pomt"`, `"tome"`, `"topk"`, ...), with settings if need be
            (`"tome:proportional_attention=false"`), or a `lightning_prune.reduction.Reduction`. Left out where the
            schedule names its method: `patch(model, plan)`, `patch(model, "schedule.yaml")`.
        schedule: Tokens that each block removes (a `Schedule` or a list), `KeepRates`, which fit images of any size,
            a `Plan`, the path of a saved one, a number of tokens removed in all, or the share of patch tokens that are
            left at the end. None for methods whose token count depends on the image (`VWTInter`).
        block: Where methods that reduce once do so if `schedule` is a number: an index, or a fraction of the depth.
        module_path: Dotted path of the transformer in `model`, needed where there are several.

    Returns:
        A handle: `handle.remove()` restores the model to the bit; it is also a context manager that does so.

    Raises:
        UnsupportedModelError: If no supported transformer is found, or several and no `module_path`.
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
    transformer = find_vision_transformer(model, module_path)
    if schedule is None and _is_schedule(method):
        schedule = read_schedule(method, "method")
        if isinstance(schedule, int | float):
            raise ArgumentError(f"`method` must be a method, or a schedule that names one, got {method!r}.")
        named = reductions_of(schedule)
        if not isinstance(named, Reduction):
            return PatchHandle(transformer, None, schedule, warns=True)
        method = named
    if not isinstance(method, str | MethodSpec | Reduction):
        raise ArgumentError(f"`method` must be a method's name, a MethodSpec or a Reduction, got {method!r}.")
    reduction = resolve(method)
    if schedule is not None and not reduction.adaptive:
        schedule = resolve_schedule(schedule, transformer, reduction, block)
    return PatchHandle(transformer, reduction, schedule, warns=True)


def _is_schedule(value: str | MethodSpec | Reduction | ScheduleLike) -> TypeGuard[ScheduleLike]:
    """Whether `value` is a schedule, or the path of one, and not a method."""
    if isinstance(value, str):
        return Path(value).suffix in (".yaml", ".yml", ".json") or (":" not in value and Path(value).is_file())
    return not isinstance(value, MethodSpec | Reduction)


def unpatch(model: nn.Module) -> None:
    """Takes every patch off `model`, whoever holds its handle: a copy of a patched model has none."""
    _restore_all(model.modules())


class PatchHandle:
    """A patched model: change its schedule with `update`, undo the patch with `remove`.

    Args:
        transformer: The Vision Transformer to patch.
        reduction: The method; None for the methods that the schedule names, one for each block.
        schedule: What the blocks remove, in any form; None where the images decide.
        warns: Whether a schedule that was made elsewhere leads to a warning.

    Attributes:
        transformer: The Vision Transformer that is patched.
        reduction: The method; None where blocks have different ones.
        schedule: What the blocks remove now; it names its method. None where the images decide.
    """

    def __init__(
        self,
        transformer: VisionTransformer,
        reduction: Reduction | None,
        schedule: ScheduleLike | None = None,
        warns: bool = False,
    ) -> None:
        self.transformer = transformer
        self.reduction = reduction
        self._warns = warns
        self._splits: dict[int, AttnMlpSplit | None] = {}
        self._sites: list[tuple[nn.Module, object]] = []
        self.schedule = self._checked(schedule)
        self._open()

    def update(self, schedule: ScheduleLike | None = None) -> None:
        """Gives the blocks another schedule; one that does not fit leaves the present one in force.

        Where another patch has replaced this one, this one replaces it in turn.

        Raises:
            ScheduleError: As `patch`.
        """
        known = self.transformer
        now = describe(known.adapter, known.root, known.path)  # its image size may have been changed
        self.transformer = replace(now, compiled_wrapper=known.compiled_wrapper)
        checked, before, was_active = self._checked(schedule), self.schedule, self.active
        try:
            self.schedule = checked
            self._open()
        except BaseException:
            self.schedule = before
            if was_active:
                self._open()
            raise

    def remove(self) -> None:
        """Restores the model to the bit. Safe to call twice, and after another patch has replaced this one."""
        sites, self._sites = self._sites, []
        _restore_all(module for module, site in sites if module.__dict__.get("_prune_patch") is site)

    @property
    def active(self) -> bool:
        """Whether this patch is the one in force."""
        return any(module.__dict__.get("_prune_patch") is site for module, site in self._sites)

    def __enter__(self) -> "PatchHandle":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "active" if self.active else "not active"
        return f"PatchHandle({self.reduction or 'several methods'}, {self.schedule!r}, {state})"

    def _checked(self, schedule: ScheduleLike | None) -> Schedule | KeepRates | None:
        reduction = self.reduction
        if reduction is not None and reduction.adaptive:
            if schedule is not None:
                raise ScheduleError(
                    f"`schedule` must be left out with {reduction.name}, whose token count depends on the image, got "
                    f"{schedule!r}."
                )
            check_reduction(self.transformer, reduction, at=0 if reduction.site == "input" else None)
            return None
        if schedule is None:
            name = "a mix of methods" if reduction is None else reduction.name
            raise ScheduleError(f"`schedule` must say how many tokens {name} removes, got None.")
        if reduction is not None:
            found = resolve_schedule(schedule, self.transformer, reduction)
        else:
            read = read_schedule(schedule)
            if isinstance(read, int | float):
                raise ScheduleError(f"`schedule` must name the method of each block, got {read!r}.")
            found = read
        check_schedule(self.transformer, reduction or reductions_of(found), found)
        return found

    def _reductions(self) -> dict[int, Reduction]:
        """Reducing block -> its method."""
        if self.schedule is None:
            assert self.reduction is not None  # adaptive
            return {self.transformer.first_prunable_block: self.reduction}
        named = self.reduction or reductions_of(self.schedule)
        return dict.fromkeys(self.schedule.reducing, named) if isinstance(named, Reduction) else named

    def _open(self) -> None:
        transformer, schedule = self.transformer, self.schedule
        unpatch(transformer.root)
        self._sites = []
        reductions = self._reductions()
        if not reductions:
            return
        methods = list(reductions.values())
        restores = transformer.pools_patches and all(method.is_lossless for method in methods)
        weighs_keys = any(method.proportional_attention for method in methods)
        # What every block after a reduction does, or the last of them.
        is_adaptive = transformer.has_position_inputs or weighs_keys or restores
        account = is_adaptive or any(method.tracks_sizes for method in methods)
        first, last = min(reductions), transformer.depth - 1 if is_adaptive else max(reductions)
        pixels = InputCapture() if any("pixels" in method.reads for method in methods) else None
        made_on = schedule.made_on if schedule is not None and self._warns else None
        reduction = reductions[first]
        try:
            for index in range(first, last + 1):
                remove = _removed_in(schedule, index) if schedule is not None else 0
                if not (remove or account or schedule is None):
                    continue
                reduces = index in reductions
                reduction = reductions.get(index, reduction)
                site = BlockPatch(
                    index=index,
                    reduction=reduction,
                    remove=remove,
                    num_prefix_tokens=transformer.num_prefix_tokens,
                    has_class_token=transformer.has_class_token,
                    adapter=transformer.adapter,
                    attn_mlp_split=self._split_of(index) if reduces and reduction.site == "block" else None,
                    has_predecessor=index > first,
                    pixels=pixels,
                    tracks_state=account,
                    tracks_positions=transformer.has_position_inputs,
                    weighs_keys=weighs_keys,
                    made_on=made_on if index == first else None,
                    is_adaptive=reduces and reduction.adaptive,
                    traces=reduces and restores,
                    restores=restores and index == last,
                )
                self._swap(transformer.blocks[index], PatchedBlock, site)
                if ("attention" in reduction.reads and reduces) or weighs_keys:
                    self._capture_attention(site, transformer.blocks[index])
            if pixels is not None:
                self._swap(transformer.patch_embed, CaptureInput, pixels)
            if transformer.adapter.guard is not None:
                self._swap(transformer.root, transformer.adapter.guard, RootPatch(transformer.root))
        except BaseException:
            self.remove()
            raise

    def _capture_attention(self, site: BlockPatch, block: nn.Module) -> None:
        """Lets a block's attention be read, and weighed, while it runs."""
        adapter = self.transformer.adapter
        site.fused_settings = adapter.force_fused(block)
        site.mask_passthrough = adapter.mask_passthrough(block)
        unfused_attention = adapter.unfused_attention(block)
        if unfused_attention:
            site.capture_slot = CaptureSlot()
            for module, mixin in unfused_attention.items():
                self._swap(module, mixin, site.capture_slot)

    def _swap(self, module: nn.Module, mixin: type[PatchedModule], site: object) -> None:
        swap_class(module, mixin, site)
        self._sites.append((module, site))

    def _split_of(self, index: int) -> AttnMlpSplit | None:
        """The verified recipe of a block; checked once, since profiling opens the same block many times."""
        if index not in self._splits:
            transformer = self.transformer
            block = transformer.blocks[index]
            attn_mlp_split = transformer.adapter.attn_mlp_split(block)
            if attn_mlp_split is not None:
                tokens, kwargs = transformer.adapter.split_check_input(transformer)
                if not verify_split(block, attn_mlp_split, tokens, transformer.embed_dim, kwargs):
                    attn_mlp_split = None
            if attn_mlp_split is None:
                self._warn_cut_after(index, type(block).__name__)
            self._splits[index] = attn_mlp_split
        return self._splits[index]

    def _warn_cut_after(self, index: int, name: str) -> None:
        said = _warned_cut_after.setdefault(self.transformer.root, set())
        if name not in said:
            said.add(name)
            _log.warning("Block %d (%s) is cut after its MLP, which still sees all its tokens.", index, name)


def _removed_in(schedule: Schedule | KeepRates, block: int) -> int | Rate:
    if block not in schedule.reducing:
        return 0
    return schedule.exact(block) if isinstance(schedule, KeepRates) else schedule.removed[block]


def _restore_all(modules: Iterable[nn.Module]) -> None:
    """Closes what can be closed, and then says what could not."""
    errors = []
    for module in modules:
        try:
            _restore(module)
        except UnsupportedModelError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _restore(module: nn.Module) -> None:
    site = module.__dict__.get("_prune_patch")
    was_overlaid = is_patched_module(module)
    restore_class(module)
    if was_overlaid and isinstance(site, BlockPatch):
        for setting in site.fused_settings:
            setting.restore()
