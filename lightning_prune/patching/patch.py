"""Opening a model's blocks to a reduction, and closing them again."""

import logging
from collections.abc import Sequence
from types import TracebackType

from torch import nn

from lightning_prune.errors import ScheduleError
from lightning_prune.patching.blocks import Halves, halves_agree
from lightning_prune.patching.families import VisionTransformer, find_vision_transformer
from lightning_prune.patching.overlay import Overlay, is_overlaid, put_on, take_off
from lightning_prune.patching.reduced import BlockSite, PixelSite, RecordingEntry, ReducedBlock, too_many
from lightning_prune.reduction import Reduction, resolve
from lightning_prune.schedule import Schedule

_log = logging.getLogger(__name__)


def patch(
    model: nn.Module, method: str | Reduction, schedule: Schedule | Sequence[int], *, target: str | None = None
) -> "PatchHandle":
    """Makes the Vision Transformer in `model` remove tokens by a schedule, in place.

    Only blocks that reduce are touched, by a subclass put over their own class: all others run their own code with
    fused attention. Parameters, buffers, `state_dict` keys and hooks stay as they are; the model deep-copies, pickles,
    compiles with `fullgraph=True` and exports. Patching a patched model replaces the patch.

    Args:
        model: Any module that contains one Vision Transformer.
        method: Name of a reduction (`"pomt"`, `"random"`) or a `lightning_prune.reduction.Reduction`.
        schedule: Tokens that each block removes.
        target: Dotted path of the transformer in `model`, needed where there are several.

    Returns:
        A handle: `handle.remove()` restores the model to the bit; it is also a context manager that does so.

    Raises:
        UnsupportedModelError: If no supported transformer is found, or several and no `target`.
        ScheduleError: If the schedule is for another depth or asks a block for more tokens than it can give.
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
    for module in model.modules():
        _close(module)


class RootSite:
    """Marks a root that is guarded by a patch; says which one, as the other sites do."""


class PatchHandle:
    """A patched model: change its schedule with `update`, undo the patch with `remove`.

    Attributes:
        transformer: The Vision Transformer that is patched.
        reduction: The method.
        schedule: What the blocks remove now.
    """

    def __init__(
        self, transformer: VisionTransformer, reduction: Reduction, schedule: Schedule | Sequence[int]
    ) -> None:
        self.transformer = transformer
        self.reduction = reduction
        self._halves: dict[int, Halves | None] = {}
        self._sites: list[tuple[nn.Module, object]] = []
        self.schedule = self._checked(schedule)
        self._open()

    def update(self, schedule: Schedule | Sequence[int]) -> None:
        """Gives the blocks another schedule; one that does not fit leaves the present one in force.

        Raises:
            ScheduleError: As `patch`.
        """
        self.schedule = self._checked(schedule)
        self._open()

    def remove(self) -> None:
        """Restores the model to the bit. Safe to call twice, and after another patch has replaced this one."""
        for module, site in self._sites:
            if module.__dict__.get("_prune_site") is site:
                _close(module)
        self._sites = []

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

    def _checked(self, schedule: Schedule | Sequence[int]) -> Schedule:
        schedule = schedule if isinstance(schedule, Schedule) else Schedule(schedule)
        check_schedule(self.transformer, self.reduction, schedule)
        return schedule

    def _open(self) -> None:
        transformer, reduction, schedule = self.transformer, self.reduction, self.schedule
        unpatch(transformer.root)
        self._sites = []
        if not schedule.total:
            return
        account = transformer.family.carries or reduction.proportional_attention
        last = transformer.depth if account else max(schedule.reducing) + 1
        pixels = PixelSite() if "pixels" in reduction.reads else None
        previous: BlockSite | None = None
        try:
            for index in range(min(schedule.reducing), last):
                remove = schedule.removed[index]
                if not (remove or account):
                    continue
                block = transformer.blocks[index]
                halves = self._halves_of(index) if remove and reduction.site == "block" else None
                site = BlockSite(
                    index=index,
                    reduction=reduction,
                    remove=remove,
                    prefix_tokens=transformer.prefix_tokens,
                    has_class_token=transformer.has_class_token,
                    family=transformer.family,
                    halves=halves,
                    previous=previous,
                    pixels=pixels,
                    keeps_account=account,
                )
                reads_attention = "attention" in reduction.reads or reduction.proportional_attention
                self._put_on(block, ReducedBlock, site)
                site.fused = transformer.family.force_fused(block) if reads_attention else []
                previous = site
            if pixels is not None:
                self._put_on(transformer.entry, RecordingEntry, pixels)
            if transformer.family.guard is not None:
                self._put_on(transformer.root, transformer.family.guard, RootSite())
        except BaseException:
            self.remove()
            raise

    def _put_on(self, module: nn.Module, mixin: type[Overlay], site: object) -> None:
        put_on(module, mixin, site)
        self._sites.append((module, site))

    def _halves_of(self, index: int) -> Halves | None:
        """The verified recipe of a block; checked once, since profiling opens the same block many times."""
        if index not in self._halves:
            transformer = self.transformer
            block = transformer.blocks[index]
            halves = transformer.family.halves(block)
            if halves is not None and not halves_agree(
                block, halves, transformer.prefix_tokens + 4, transformer.channels
            ):
                halves = None
            if halves is None:
                name = type(block).__name__
                _log.info("Block %d (%s) is cut after its MLP, which still sees all its tokens.", index, name)
            self._halves[index] = halves
        return self._halves[index]


def check_schedule(transformer: VisionTransformer, reduction: Reduction, schedule: Schedule) -> None:
    """Raises ScheduleError, naming the numbers, if the schedule does not fit the transformer and the reduction.

    Where the token count depends on the image size, the counts are checked in forward instead.
    """
    if schedule.depth != transformer.depth:
        raise ScheduleError(f"The schedule is for {schedule.depth} blocks; this model has {transformer.depth}.")
    if reduction.site == "input" and any(schedule.removed[1:]):
        block = next(b for b in schedule.reducing if b)
        raise ScheduleError(
            f"{reduction.name} removes tokens before block 0; the schedule asks block {block} for some."
        )
    if transformer.tokens is None:
        return
    count = transformer.tokens
    for index, remove in enumerate(schedule.removed):
        capacity = reduction.capacity(count, transformer.prefix_tokens)
        if remove > capacity:
            raise ScheduleError(too_many(index, count, remove, capacity, reduction.name))
        count -= remove


def _close(module: nn.Module) -> None:
    site = module.__dict__.get("_prune_site")
    was_overlaid = is_overlaid(module)
    take_off(module)
    if was_overlaid and isinstance(site, BlockSite):
        site.family.undo_fused(site.fused)
