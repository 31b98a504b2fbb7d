"""Opening a model's blocks to a reduction, and closing them again."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from weakref import WeakKeyDictionary

from torch import nn

from lightning_prune.errors import ScheduleError, UnsupportedModelError
from lightning_prune.patching.attention_capture import CaptureSlot
from lightning_prune.patching.block_split import AttnMlpSplit, verify_split
from lightning_prune.patching.class_swap import PatchedModule, RootPatch, is_patched_module, restore_class, swap_class
from lightning_prune.patching.compatibility import check_reduction, check_schedule
from lightning_prune.patching.models import VisionTransformer, describe, find_vision_transformer
from lightning_prune.patching.patched_block import (
    BlockPatch,
    CaptureInput,
    InputCapture,
    MeasurementSource,
    PatchedBlock,
)
from lightning_prune.reduction import Reduction, resolve
from lightning_prune.schedule import KeepRates, Rate, Schedule

_log = logging.getLogger(__name__)
# Model -> classes of blocks of which it was said that they are cut after the MLP: a search patches hundreds of times.
_said_cut_after: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def patch(
    model: nn.Module,
    method: str | Reduction,
    schedule: Schedule | KeepRates | Sequence[int] | None = None,
    *,
    target: str | None = None,
) -> "PatchHandle":
    """Makes the Vision Transformer in `model` remove tokens by a schedule, in place.

    Only blocks that reduce are touched, by a subclass put over their own class: all others run their own code with
    fused attention. Parameters, buffers, `state_dict` keys and hooks stay as they are; the model deep-copies, pickles,
    compiles with `fullgraph=True` and exports. Patching a patched model replaces the patch.

    A schedule that says on which device and at which batch size it was made is used elsewhere with a warning, at the
    first batch that a block sees (not in a compiled graph, which has no place for one).

    Args:
        model: Any module that contains one Vision Transformer.
        method: Name of a reduction (`"pomt"`, `"tome"`, `"topk"`, ...) or a `lightning_prune.reduction.Reduction`.
        schedule: Tokens that each block removes, or keep rates, which fit images of any size. To be left out where
            the images decide that, as they do with visual words of several images (`VWTInter`).
        target: Dotted path of the transformer in `model`, needed where there are several.

    Returns:
        A handle: `handle.remove()` restores the model to the bit; it is also a context manager that does so.

    Raises:
        UnsupportedModelError: If no supported transformer is found, or several and no `target`.
        ScheduleError: If the schedule is for another depth or token count, or asks a block for more tokens than it
            can give; names the numbers. Where images decide the token count, in forward.
        ArgumentError: If `method` or `target` is unknown.

    Example:
        >>> import timm
        >>> import torch
        >>> import lightning_prune as lp
        >>> model = timm.create_model("vit_tiny_patch16_224").eval()
        >>> with lp.patch(model, "pomt", lp.Schedule.single(depth=12, block=3, remove=56)):
        ...     logits = model(torch.randn(1, 3, 224, 224))
    """
    return PatchHandle(find_vision_transformer(model, target), resolve(method), schedule)


def unpatch(model: nn.Module) -> None:
    """Takes every patch off `model`, whoever holds its handle: a copy of a patched model has none."""
    _close_all(model.modules())


class PatchHandle:
    """A patched model: change its schedule with `update`, undo the patch with `remove`.

    Attributes:
        transformer: The Vision Transformer that is patched.
        reduction: The method.
        schedule: What the blocks remove now; None where the images decide.
    """

    def __init__(
        self,
        transformer: VisionTransformer,
        reduction: Reduction,
        schedule: Schedule | KeepRates | Sequence[int] | None = None,
    ) -> None:
        self.transformer = transformer
        self.reduction = reduction
        self._halves: dict[int, AttnMlpSplit | None] = {}
        self._sites: list[tuple[nn.Module, object]] = []
        self.schedule = self._checked(schedule)
        self._open()

    def update(self, schedule: Schedule | KeepRates | Sequence[int] | None = None) -> None:
        """Gives the blocks another schedule; one that does not fit leaves the present one in force.

        Where another patch has replaced this one, this one replaces it in turn.

        Raises:
            ScheduleError: As `patch`.
        """
        known = self.transformer
        now = describe(known.family, known.root, known.path)  # its image size may have been changed
        self.transformer = replace(now, compiled=known.compiled)
        schedule, before, was_active = self._checked(schedule), self.schedule, self.active
        try:
            self.schedule = schedule
            self._open()
        except BaseException:
            self.schedule = before
            if was_active:
                self._open()
            raise

    def remove(self) -> None:
        """Restores the model to the bit. Safe to call twice, and after another patch has replaced this one."""
        sites, self._sites = self._sites, []
        _close_all(module for module, site in sites if module.__dict__.get("_prune_site") is site)

    @property
    def active(self) -> bool:
        """Whether this patch is the one in force."""
        return any(module.__dict__.get("_prune_site") is site for module, site in self._sites)

    def __enter__(self) -> "PatchHandle":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "active" if self.active else "not active"
        return f"PatchHandle({self.reduction!r}, {self.schedule!r}, {state})"

    def _checked(self, schedule: Schedule | KeepRates | Sequence[int] | None) -> Schedule | KeepRates | None:
        name = self.reduction.name
        if self.reduction.adaptive:
            if schedule is not None:
                raise ScheduleError(
                    f"With {name} the images decide how many tokens go: `schedule` must be left out, got {schedule!r}."
                )
            check_reduction(self.transformer, self.reduction, at=0 if self.reduction.site == "input" else None)
            return None
        if schedule is None:
            raise ScheduleError(f"`schedule` is missing: {name} removes as many tokens as a schedule says; got None.")
        if isinstance(schedule, str | Path | int | float):
            raise ScheduleError(
                f"`schedule` must be a Schedule, KeepRates or a list with one number a block, got {schedule!r}; "
                "load_schedule reads files, Schedule.single and KeepRates.single are for one block."
            )
        schedule = schedule if isinstance(schedule, Schedule | KeepRates) else Schedule(schedule)
        check_schedule(self.transformer, self.reduction, schedule)
        return schedule

    def _open(self) -> None:
        transformer, reduction, schedule = self.transformer, self.reduction, self.schedule
        unpatch(transformer.root)
        self._sites = []
        reducing = schedule.reducing if schedule is not None else (transformer.first,)
        if not reducing:
            return
        restores = transformer.pools_patches and reduction.merges
        # What every block after a reduction does, or the last of them.
        adapts = transformer.has_position_inputs or reduction.proportional_attention or restores
        account = adapts or reduction.tracks_sizes
        first, last = min(reducing), transformer.depth - 1 if adapts else max(reducing)
        pixels = InputCapture() if "pixels" in reduction.reads else None
        expects = schedule.provenance.get("tokens_dense") if isinstance(schedule, Schedule) else None
        origin = MeasurementSource.of(schedule.provenance) if schedule is not None else None
        try:
            for index in range(first, last + 1):
                remove = _asked(schedule, index) if schedule is not None else 0
                if not (remove or account or schedule is None):
                    continue
                reduces = index in reducing
                site = BlockPatch(
                    index=index,
                    reduction=reduction,
                    remove=remove,
                    prefix_tokens=transformer.prefix_tokens,
                    has_class_token=transformer.has_class_token,
                    family=transformer.family,
                    attn_mlp_split=self._halves_of(index) if reduces and reduction.site == "block" else None,
                    follows=index > first,
                    pixels=pixels,
                    keeps_account=account,
                    keeps_places=transformer.has_position_inputs,
                    expects=expects if index == first else None,
                    origin=origin if index == first else None,
                    adapts=reduces and reduction.adaptive,
                    traces=reduces and restores,
                    restores=restores and index == last,
                )
                self._put_on(transformer.blocks[index], PatchedBlock, site)
                if ("attention" in reduction.reads and reduces) or reduction.proportional_attention:
                    self._make_readable(site, transformer.blocks[index])
            if pixels is not None:
                self._put_on(transformer.entry, CaptureInput, pixels)
            if transformer.family.guard is not None:
                self._put_on(transformer.root, transformer.family.guard, RootPatch(transformer.root))
        except BaseException:
            self.remove()
            raise

    def _make_readable(self, site: BlockPatch, block: nn.Module) -> None:
        """Lets a block's attention be read, and weighed, while it runs."""
        family = self.transformer.family
        site.fused = family.force_fused(block)
        site.mask_passthrough = family.mask_passthrough(block)
        told = family.told(block)
        if told:
            site.ear = CaptureSlot()
            for module, mixin in told.items():
                self._put_on(module, mixin, site.ear)

    def _put_on(self, module: nn.Module, mixin: type[PatchedModule], site: object) -> None:
        swap_class(module, mixin, site)
        self._sites.append((module, site))

    def _halves_of(self, index: int) -> AttnMlpSplit | None:
        """The verified recipe of a block; checked once, since profiling opens the same block many times."""
        if index not in self._halves:
            transformer = self.transformer
            block = transformer.blocks[index]
            attn_mlp_split = transformer.family.attn_mlp_split(block)
            if attn_mlp_split is not None:
                tokens, kwargs = transformer.family.trial(transformer)
                if not verify_split(block, attn_mlp_split, tokens, transformer.channels, kwargs):
                    attn_mlp_split = None
            if attn_mlp_split is None:
                self._say_cut_after(index, type(block).__name__)
            self._halves[index] = attn_mlp_split
        return self._halves[index]

    def _say_cut_after(self, index: int, name: str) -> None:
        said = _said_cut_after.setdefault(self.transformer.root, set())
        if name not in said:
            said.add(name)
            _log.warning("Block %d (%s) is cut after its MLP, which still sees all its tokens.", index, name)


def _asked(schedule: Schedule | KeepRates, block: int) -> int | Rate:
    if block not in schedule.reducing:
        return 0
    return schedule.exact(block) if isinstance(schedule, KeepRates) else schedule.removed[block]


def _close_all(modules: Iterable[nn.Module]) -> None:
    """Closes what can be closed, and then says what could not."""
    errors = []
    for module in modules:
        try:
            _close(module)
        except UnsupportedModelError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _close(module: nn.Module) -> None:
    site = module.__dict__.get("_prune_site")
    was_overlaid = is_patched_module(module)
    restore_class(module)
    if was_overlaid and isinstance(site, BlockPatch):
        for setting in site.fused:
            setting.restore()
