"""The handle of a patched model: patches the blocks for a schedule, and restores them."""

import logging
from collections.abc import Iterable
from dataclasses import replace
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from lightning_prune._utils.validation import check
from lightning_prune.errors import ScheduleError, UnsupportedModelError
from lightning_prune.patching.attention_capture import CaptureSlot
from lightning_prune.patching.block_split import AttnMlpSplit
from lightning_prune.patching.class_swap import (
    PatchedModule,
    change_settings,
    is_patched_module,
    original_class,
    restore_class,
    swap_class,
)
from lightning_prune.patching.compatibility import (
    check_reduction,
    check_schedule,
    head_reason,
    last_block_reason,
    verified_split,
)
from lightning_prune.patching.exact_tail import ExactTail, watched_modules
from lightning_prune.patching.input_resize import InputResize, ResizedModule
from lightning_prune.patching.models import VisionTransformer, describe
from lightning_prune.patching.patched_block import (
    BlockPatch,
    CaptureInput,
    InputCapture,
    PatchedBlock,
)
from lightning_prune.patching.patched_root import PatchedRoot, RootPatch
from lightning_prune.patching.schedule_forms import fitted, reductions_of, resolve_schedule
from lightning_prune.patching.token_readers import TokenReaders
from lightning_prune.reduction import Reduction
from lightning_prune.schedule import KeepRates, Rate, Schedule, ScheduleLike, read_schedule

_log = logging.getLogger(__name__)
# Model -> classes of blocks that were warned about: a search patches hundreds of times.
_warned_cut_after: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def unpatch(model: nn.Module) -> None:
    """Restores a patched model to the bit without its handle: a copy of a patched model has none.

    Args:
        model: Contains patched modules or not.

    Raises:
        UnsupportedModelError: If the class or the `forward` of a patched module was replaced since then. All other
            modules are restored.
    """
    _restore_all(model.modules())


class PatchHandle:
    """A patched model: change its schedule with `update`, undo the patch with `remove`.

    Args:
        transformer: The Vision Transformer to patch.
        reduction: The method; None for the methods that the schedule names, one for each block.
        schedule: What the blocks remove, in any form; None where the images decide.
        warns: Whether a schedule that was made elsewhere leads to a warning.
        tail: As of `lightning_prune.patch`; by default there is none, as measurements compare blocks.
        exact: Whether nothing but the exact tail is patched, without a method and a schedule.

    Raises:
        ArgumentError, ScheduleError, UnsupportedModelError: As `lightning_prune.patch`.

    Attributes:
        transformer: The Vision Transformer that is patched.
        reduction: The method; None where blocks have different ones, and for the exact tail alone.
        schedule: What the blocks remove now; it names its method. None where the images decide.
        has_tail: Whether the model is patched with the exact tail.
    """

    def __init__(
        self,
        transformer: VisionTransformer,
        reduction: Reduction | None,
        schedule: ScheduleLike | None = None,
        warns: bool = False,
        tail: bool | None = False,
        exact: bool = False,
    ) -> None:
        self.transformer = transformer
        self.reduction = reduction
        self.has_tail = False
        self._warns = warns
        self._tail = tail
        self._exact = exact
        self._splits: dict[int, AttnMlpSplit | None] = {}
        # The modules of the last block and of the norms after it with their classes, and what was found out of them.
        self._last_block: tuple[list[tuple[nn.Module, type]], str | None] | None = None
        self._patched: list[tuple[nn.Module, object]] = []  # with what each works on, as its `_prune_patch`
        if tail is not False or exact:  # before an earlier patch is removed
            self._refuse_tail(head_reason(transformer, tail is True))
        self.schedule = self._checked(schedule)
        self._apply()

    def update(self, schedule: ScheduleLike | None = None) -> None:
        """Patches the model with another schedule; one that does not fit leaves the present one in force.

        A patch that has replaced this one is replaced in turn.

        Args:
            schedule: As of the class.

        Raises:
            ArgumentError: If the schedule names another method, or none where the handle has none.
            ScheduleError: As `lightning_prune.patch`.
            UnsupportedModelError: As `lightning_prune.patch`.
        """
        known = self.transformer
        now = describe(known.adapter, known.root, known.path)  # its image size may have been changed
        names = ["compiled_wrapper", "restore", "reader", "reads_logits"]
        names += ["num_classes"] if known.reader is not None else []  # what the reader returns, not the root
        self.transformer = replace(now, **{name: getattr(known, name) for name in names})
        checked, before, was_active = self._checked(schedule), self.schedule, self.active
        try:
            self.schedule = checked
            self._apply()
        except BaseException:
            self.schedule = before
            if was_active:
                self._apply()
            raise

    def remove(self) -> None:
        """Restores the model to the bit. Safe to call twice, and after another patch has replaced this one."""
        patched, self._patched = self._patched, []
        _restore_all(module for module, state in patched if module.__dict__.get("_prune_patch") is state)

    @property
    def active(self) -> bool:
        """Whether this patch is in force: neither removed nor replaced."""
        return any(module.__dict__.get("_prune_patch") is state for module, state in self._patched)

    def __enter__(self) -> "PatchHandle":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "active" if self.active else "not active"
        if self._exact:
            return f"PatchHandle('exact', {state})"
        return f"PatchHandle({self.reduction or 'several methods'}, {self.schedule!r}, {state})"

    def _checked(self, schedule: ScheduleLike | None) -> Schedule | KeepRates | None:
        """The schedule as the blocks need it, checked against the model; None where the images decide."""
        reduction = self.reduction
        if self._exact:
            check("schedule", schedule, "left out with 'exact', which removes no tokens", schedule is None)
            return Schedule([0] * self.transformer.depth)
        if reduction is not None and reduction.adaptive:
            if schedule is not None:
                raise ScheduleError(
                    f"`schedule` must be left out with {reduction.name}, whose token count depends on the image, got "
                    f"{schedule!r}."
                )
            check_reduction(self.transformer, reduction, block=0 if reduction.site == "input" else None)
            return None
        if schedule is None:
            name = "each method" if reduction is None else reduction.name
            raise ScheduleError(f"`schedule` must say how many tokens {name} removes, got None.")
        if reduction is not None:
            found = resolve_schedule(schedule, self.transformer, reduction)
        else:
            read = read_schedule(schedule)
            if isinstance(read, int | float):
                raise ScheduleError(f"`schedule` must name the method of each block, got {read!r}.")
            found = read
        found = fitted(found, self.transformer, reduction)
        check_schedule(self.transformer, reduction or reductions_of(found), found)
        return found

    def _reductions(self) -> dict[int, Reduction]:
        """Reducing block -> its method."""
        if self.schedule is None:
            assert self.reduction is not None  # adaptive
            return {self.transformer.first_prunable_block: self.reduction}
        if not self.schedule.reducing:
            return {}
        named = self.reduction or reductions_of(self.schedule)
        return dict.fromkeys(self.schedule.reducing, named) if isinstance(named, Reduction) else named

    def _apply(self) -> None:
        transformer, root = self.transformer, self.transformer.root
        unpatch(root)
        self._patched, self.has_tail = [], False
        reductions = self._reductions()
        if not reductions and not self._exact:
            return
        scaling = reductions.pop(0) if 0 in reductions and reductions[0].scales_images else None
        tail, readers = self._new_tail(), self._new_readers(reductions, scaling)
        deciding = readers if transformer.restore is not None else None  # by what the call reads
        try:
            if reductions or (scaling is not None and deciding is not None):
                self._patch_blocks(reductions, self._warns and scaling is None, tail, readers)
            last = transformer.depth - 1
            if tail is not None and not is_patched_module(transformer.blocks[last]):
                self._swap(transformer.blocks[last], PatchedBlock, self._block_patch(last, None, 0, tail=tail))
            guard = PatchedRoot if self._exact else transformer.adapter.guard
            if scaling is not None:
                guard = self._scale_images(scaling, tail, deciding) or guard
            takes_part = isinstance(root, PatchedRoot)  # in the scaling, and then it is patched
            if not takes_part and (tail is not None or deciding is not None or guard is not PatchedRoot):
                self._swap(root, guard, RootPatch(root, tail, deciding))
            self.has_tail = tail is not None
        except BaseException:
            self.remove()
            raise

    def _new_readers(self, reductions: dict[int, Reduction], scaling: Reduction | None) -> TokenReaders | None:
        """Who reads all tokens of the patched model; None if the removed ones are not given back."""
        transformer, last = self.transformer, self.transformer.depth - 1
        merges = bool(reductions) and all(method.is_lossless for method in reductions.values())
        is_restored = transformer.restore is not None and bool(reductions or scaling)
        if not is_restored and not (transformer.pools_patches and merges):
            return None
        root, adapter = transformer.root, transformer.adapter
        outer = watched_modules(root, transformer.blocks[last], adapter.final_norms(root))
        inner = set(transformer.blocks[last].modules())
        return TokenReaders(
            transformer.restore or "copy",
            adapter,
            transformer.blocks,
            tuple(module for module in outer if module not in inner),
            0 if scaling is not None and transformer.restore else min(reductions),
            None if transformer.restore else frozenset((last,)),  # a pool of patches weights them by their copies
        )

    def _patch_blocks(
        self, reductions: dict[int, Reduction], warns: bool, tail: ExactTail | None, readers: TokenReaders | None
    ) -> None:
        """Patches the blocks that reduce, and later ones that need to know which tokens are left."""
        transformer, schedule = self.transformer, self.schedule
        methods = list(reductions.values())
        weighs_keys = any(method.proportional_attention for method in methods)
        # Where blocks that do not reduce must be patched too: up to the last block of the model.
        patches_to_end = transformer.has_position_inputs or weighs_keys or readers is not None
        tracks_state = patches_to_end or any(method.tracks_sizes for method in methods)
        first = min(reductions) if readers is None else readers.first
        last = transformer.depth - 1 if patches_to_end else max(reductions)
        pixels = InputCapture() if any("pixels" in method.reads for method in methods) else None
        made_on = schedule.made_on if schedule is not None and warns else None
        reduction = reductions.get(first)  # None in front of the first block that reduces, where images are scaled
        for index in range(first, last + 1):
            remove = _removed_in(schedule, index) if schedule is not None and index in reductions else 0
            if not (remove or tracks_state or schedule is None):
                continue
            reduces = index in reductions
            reduction = reductions.get(index, reduction)
            block_patch = self._block_patch(
                index,
                reduction,
                remove,
                tail=tail if index == transformer.depth - 1 else None,
                reduces=reduces,
                has_predecessor=index > first,
                pixels=pixels,
                tracks_state=tracks_state,
                tracks_positions=transformer.has_position_inputs,
                weighs_keys=weighs_keys,
                made_on=made_on if index == first else None,
                is_adaptive=reduces and reduction is not None and reduction.adaptive,
                readers=readers,
            )
            self._swap(transformer.blocks[index], PatchedBlock, block_patch)
            if (reduction is not None and reduces and "attention" in reduction.reads) or weighs_keys:
                self._capture_attention(block_patch, transformer.blocks[index])
        if pixels is not None:
            self._swap(transformer.patch_embed, CaptureInput, pixels)

    def _block_patch(
        self,
        index: int,
        reduction: Reduction | None,
        remove: int | Rate,
        *,
        tail: ExactTail | None,
        reduces: bool = False,
        **settings: Any,
    ) -> BlockPatch:
        """The settings of one block; further ones as of `BlockPatch`."""
        transformer = self.transformer
        if reduces and reduction is not None and reduction.site == "block":
            attn_mlp_split = self._split_of(index)
            if attn_mlp_split is None:
                self._warn_cut_after(index, type(transformer.blocks[index]).__name__)
        else:
            attn_mlp_split = None if tail is None else self._split_of(index)
        return BlockPatch(
            index=index,
            depth=transformer.depth,
            reduction=reduction,
            remove=remove,
            num_prefix_tokens=transformer.num_prefix_tokens,
            has_class_token=transformer.has_class_token,
            adapter=transformer.adapter,
            attn_mlp_split=attn_mlp_split,
            tail=tail,
            **settings,
        )

    def _new_tail(self) -> ExactTail | None:
        """The exact tail of the model; None if it was not asked for, or there can be none.

        Raises:
            UnsupportedModelError: If there can be none, and it was asked for.
        """
        if self._tail is False and not self._exact:
            return None
        transformer = self.transformer
        root, adapter, last = transformer.root, transformer.adapter, transformer.depth - 1
        reason = head_reason(transformer, self._tail is True) or self._last_block_reason()
        self._refuse_tail(reason)
        if reason is not None:
            return None
        return ExactTail(adapter, watched_modules(root, transformer.blocks[last], adapter.final_norms(root)))

    def _last_block_reason(self) -> str | None:
        """Why the last block allows no exact tail; verified once as long as its modules are the same."""
        transformer, last = self.transformer, self.transformer.depth - 1
        modules = [*transformer.blocks[last].modules()]
        modules += [part for norm in transformer.adapter.final_norms(transformer.root) for part in norm.modules()]
        state = [(module, type(module)) for module in modules]
        is_replaced = any("forward" in vars(module) for module in modules)  # may be put back unseen
        if self._last_block is not None and not is_replaced:
            seen, reason = self._last_block
            same = (a is b and kind is other for (a, kind), (b, other) in zip(state, seen, strict=False))
            if len(state) == len(seen) and all(same):
                return reason
        reason = last_block_reason(transformer, self._split_of(last))
        self._last_block = None if is_replaced else (state, reason)
        return reason

    def _refuse_tail(self, reason: str | None) -> None:
        """Raises UnsupportedModelError if the model can have no exact tail, for this reason, and one was asked for."""
        if reason is None or not (self._tail or self._exact):
            return
        argument = "`tail` must be None or False" if self._tail else "`method` must not be 'exact'"
        name = original_class(self.transformer.root).__name__
        raise UnsupportedModelError(f"{argument} for this {name}, which has no exact tail: {reason}.")

    def _scale_images(
        self, reduction: Reduction, tail: ExactTail | None, readers: TokenReaders | None
    ) -> type[PatchedRoot] | None:
        """Has the images scaled down; after the blocks are patched, which are compared with their own forward first.

        Returns:
            The mixin for the root, in place of the guard of the adapter; None for that one.
        """
        transformer, schedule = self.transformer, self.schedule
        assert schedule is not None
        resize = InputResize(
            reduction,
            _removed_in(schedule, 0),
            transformer.num_prefix_tokens,
            transformer.adapter.patch_division(transformer.root),
            schedule.made_on if self._warns else None,
        )
        resize.tail, resize.readers = tail, readers
        if readers is not None:
            readers.scaled = resize
        sites = transformer.adapter.scaling_sites(transformer, resize)
        for module, mixin in sites.mixins.items():
            self._swap(module, mixin, resize)
        resize.settings = change_settings(sites.settings)
        for module in sites.mixins:
            assert isinstance(module, ResizedModule)
            module.prepare()
        return sites.guard

    def _capture_attention(self, block_patch: BlockPatch, block: nn.Module) -> None:
        """Prepares a block so that its attention can be read, and its keys weighted, while it runs."""
        adapter = self.transformer.adapter
        block_patch.settings = adapter.force_fused(block)
        block_patch.mask_passthrough = adapter.mask_passthrough(block)
        unfused_attention = adapter.unfused_attention(block)
        if unfused_attention:
            block_patch.capture_slot = CaptureSlot()
            for module, mixin in unfused_attention.items():
                self._swap(module, mixin, block_patch.capture_slot)

    def _swap(self, module: nn.Module, mixin: type[PatchedModule], state: object) -> None:
        swap_class(module, mixin, state)
        self._patched.append((module, state))

    def _split_of(self, index: int) -> AttnMlpSplit | None:
        """How to run a block in two parts; None where the parts do not give what the block gives.

        Verified once for each block, since a search patches the same block many times.
        """
        if index not in self._splits:
            self._splits[index] = verified_split(self.transformer, index)
        return self._splits[index]

    def _warn_cut_after(self, index: int, name: str) -> None:
        warned = _warned_cut_after.setdefault(self.transformer.root, set())
        if name not in warned:
            warned.add(name)
            _log.warning("Block %d (%s) is cut after its MLP, which still sees all its tokens.", index, name)


def _removed_in(schedule: Schedule | KeepRates, block: int) -> int | Rate:
    if block not in schedule.reducing:
        return 0
    return schedule.exact(block) if isinstance(schedule, KeepRates) else schedule.removed[block]


def _restore_all(modules: Iterable[nn.Module]) -> None:
    """Restores all modules that can be restored, then raises the first error."""
    errors = []
    for module in modules:
        if not isinstance(module, PatchedModule):  # nearly all of them, and a search patches hundreds of times
            continue
        try:
            _restore(module)
        except UnsupportedModelError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _restore(module: nn.Module) -> None:
    state = module.__dict__.get("_prune_patch")
    was_patched = is_patched_module(module)
    restore_class(module)
    if was_patched and isinstance(state, BlockPatch | InputResize):
        for setting in state.settings:
            setting.restore()
