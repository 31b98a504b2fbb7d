"""The handle of a patched model: patches the blocks for a schedule, and restores them."""

import logging
from collections.abc import Iterable
from dataclasses import replace
from types import TracebackType
from weakref import WeakKeyDictionary

from torch import nn

from lightning_prune.errors import ScheduleError, UnsupportedModelError
from lightning_prune.patching.attention_capture import CaptureSlot
from lightning_prune.patching.block_split import AttnMlpSplit, verify_split
from lightning_prune.patching.class_swap import (
    PatchedModule,
    RootPatch,
    change_settings,
    is_patched_module,
    restore_class,
    swap_class,
)
from lightning_prune.patching.compatibility import check_reduction, check_schedule
from lightning_prune.patching.input_resize import InputResize, ResizedModule
from lightning_prune.patching.models import VisionTransformer, describe
from lightning_prune.patching.patched_block import (
    BlockPatch,
    CaptureInput,
    InputCapture,
    PatchedBlock,
)
from lightning_prune.patching.schedule_forms import fitted, reductions_of, resolve_schedule
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

    Raises:
        ArgumentError, ScheduleError, UnsupportedModelError: As `lightning_prune.patch`.

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
        self._patched: list[tuple[nn.Module, object]] = []  # with what each works on, as its `_prune_patch`
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
        self.transformer = replace(now, compiled_wrapper=known.compiled_wrapper)
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
        return f"PatchHandle({self.reduction or 'several methods'}, {self.schedule!r}, {state})"

    def _checked(self, schedule: ScheduleLike | None) -> Schedule | KeepRates | None:
        """The schedule as the blocks need it, checked against the model; None where the images decide."""
        reduction = self.reduction
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
        named = self.reduction or reductions_of(self.schedule)
        return dict.fromkeys(self.schedule.reducing, named) if isinstance(named, Reduction) else named

    def _apply(self) -> None:
        unpatch(self.transformer.root)
        self._patched = []
        reductions = self._reductions()
        scaling = reductions.pop(0) if 0 in reductions and reductions[0].scales_images else None
        try:
            if reductions:
                self._patch_blocks(reductions, warns=self._warns and scaling is None)
            guard, root = self.transformer.adapter.guard, self.transformer.root
            if scaling is not None:
                guard = self._scale_images(scaling) or guard
            if self._patched and guard is not None:
                self._swap(root, guard, RootPatch(root))
        except BaseException:
            self.remove()
            raise

    def _patch_blocks(self, reductions: dict[int, Reduction], warns: bool) -> None:
        """Patches the blocks that reduce, and those that need to know which tokens are left."""
        transformer, schedule = self.transformer, self.schedule
        methods = list(reductions.values())
        restores = transformer.pools_patches and all(method.is_lossless for method in methods)
        weighs_keys = any(method.proportional_attention for method in methods)
        # Where blocks that do not reduce must be patched too: up to the last block of the model.
        patches_to_end = transformer.has_position_inputs or weighs_keys or restores
        tracks_state = patches_to_end or any(method.tracks_sizes for method in methods)
        first, last = min(reductions), transformer.depth - 1 if patches_to_end else max(reductions)
        pixels = InputCapture() if any("pixels" in method.reads for method in methods) else None
        made_on = schedule.made_on if schedule is not None and warns else None
        reduction = reductions[first]
        for index in range(first, last + 1):
            remove = _removed_in(schedule, index) if schedule is not None else 0
            if not (remove or tracks_state or schedule is None):
                continue
            reduces = index in reductions
            reduction = reductions.get(index, reduction)
            block_patch = BlockPatch(
                index=index,
                depth=transformer.depth,
                reduction=reduction,
                remove=remove,
                num_prefix_tokens=transformer.num_prefix_tokens,
                has_class_token=transformer.has_class_token,
                adapter=transformer.adapter,
                attn_mlp_split=self._split_of(index) if reduces and reduction.site == "block" else None,
                has_predecessor=index > first,
                pixels=pixels,
                tracks_state=tracks_state,
                tracks_positions=transformer.has_position_inputs,
                weighs_keys=weighs_keys,
                made_on=made_on if index == first else None,
                is_adaptive=reduces and reduction.adaptive,
                traces=reduces and restores,
                restores=restores and index == last,
            )
            self._swap(transformer.blocks[index], PatchedBlock, block_patch)
            if ("attention" in reduction.reads and reduces) or weighs_keys:
                self._capture_attention(block_patch, transformer.blocks[index])
        if pixels is not None:
            self._swap(transformer.patch_embed, CaptureInput, pixels)

    def _scale_images(self, reduction: Reduction) -> type[PatchedModule] | None:
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
