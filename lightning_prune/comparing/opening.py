"""The first batch of a comparison: what is known of the question already, and deciding the rest."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor

from lightning_prune.callbacks import TokenPruning
from lightning_prune.callbacks.images import calibration_images, images_from_batch
from lightning_prune.callbacks.planned import profiled, sample
from lightning_prune.callbacks.random_state import preserving_random_state
from lightning_prune.callbacks.together import decided_by_rank_zero, refuse_sharded
from lightning_prune.comparing.decide import decide
from lightning_prune.comparing.entries import Entry
from lightning_prune.comparing.planned import Decided, Planned, reduction_of
from lightning_prune.comparing.question import ask, data_identity, digest, weights_digest
from lightning_prune.comparing.state import Finished, State
from lightning_prune.errors import DataError
from lightning_prune.patching import TokenTrace, find_vision_transformer, trace_tokens
from lightning_prune.planning.block_search import BlockSearch
from lightning_prune.profiling import measurement_context
from lightning_prune.schedule import Schedule

_PICTURES = 4  # images whose tokens are traced


class Opening(L.Callback):
    """Asks on the first batch of a validation run of one batch what is known of the question, and decides the rest."""

    def __init__(
        self,
        pruner: TokenPruning,
        entries: Sequence[Entry],
        speedups: Sequence[float],
        output: Path,
        fresh: bool,
        tell: Callable[[str], None],
        limit: int | float | None,
    ) -> None:
        self.limit = limit  # of the runs to come: this one has one batch
        self.pruner, self.entries, self.speedups = pruner, entries, speedups
        self.output, self.fresh, self.tell = output, fresh, tell
        self.state: State | None = None  # on rank 0
        self.decided: Decided | None = None
        self.finished: dict[str, Finished] = {}
        self.pictures: Tensor | None = None
        self.traces: dict[str, TokenTrace] = {}

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Decides, once."""
        if self.decided is None and not dataloader_idx:
            refuse_sharded(trainer)
            found = decided_by_rank_zero(trainer, lambda: self._decide(trainer, pl_module, batch))
            self.decided, self.finished = found

    def _decide(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any
    ) -> tuple[Decided, dict[str, Finished]]:
        pruner = self.pruner
        pruner.compilation.begin(pruner, pl_module)
        images = images_from_batch(batch, pruner.images_from_batch)
        with preserving_random_state(), trainer.precision_plugin.forward_context():
            transformer = find_vision_transformer(pl_module, pruner.target)
            calibration = None
            settings: dict[str, Any] = {
                "block": pruner.place,
                "max_seconds": pruner.max_seconds,
                "target": pruner.target,
            }
            if any(entry.searches for entry in self.entries):
                calibration = sample(pruner, trainer, pl_module, batch).images
                settings["calibration"] = digest(calibration)
            question = ask(
                weights=weights_digest(pl_module),
                data=data_identity(trainer.val_dataloaders, batch, self.limit),
                context=measurement_context(transformer.runner, images),
                entries=self.entries,
                speedups=self.speedups,
                settings=settings,
            )
            self.state = State(self.output, question, self.fresh)
            decided = self.state.decided()
            if decided is None:
                self._tell_news(self.state)
                decided = decide(
                    transformer,
                    images,
                    self.entries,
                    self.speedups,
                    block=pruner.place,
                    max_seconds=pruner.max_seconds,
                    progress=pruner.verbose,
                    searching=None if calibration is None else partial(self._search, pl_module, images, calibration),
                )
                self.state.keep_decided(decided)
            finished = self._known(self.state, decided)
            pictures = self._pictures(trainer, pl_module, batch, images)
            self.pictures = pictures.detach().cpu()
            self.traces = self._traced(pl_module, pictures, decided)
        return decided, finished

    def _search(self, pl_module: L.LightningModule, images: Tensor, calibration: Tensor) -> BlockSearch:
        """What `auto` searches with; its latency curve may be one that is kept."""
        pruner = self.pruner
        found = profiled(pruner, pl_module, images, over_blocks=True)
        if found.reused:
            when = found.profile.context.get("measured", "before")
            self.tell(f"The latency curve that `auto` plans on was measured {when}, and kept.")
        return BlockSearch(
            model=pl_module,
            transformer=find_vision_transformer(pl_module, pruner.target),
            images=calibration,
            batch=images,
            curve=found.profile,
            foreign=False,
            max_seconds=pruner.max_seconds,
            target=pruner.target,
            progress=pruner.verbose,
        )

    def _known(self, state: State, decided: Decided) -> dict[str, Finished]:
        variants = [planned.variant for planned in decided.planned if planned.timing is not None]
        found = {variant: state.finished(variant) for variant in variants}
        known = {variant: finished for variant, finished in found.items() if finished is not None}
        if known:
            self.tell(f"Going on from {state.folder}: {len(known)} of {len(variants)} variants were finished before.")
        return known

    def _tell_news(self, state: State) -> None:
        news = state.news()
        if news:
            self.tell(f"Starting anew beside what {state.folder.parent} holds: {', '.join(news)} differ.")

    def _pictures(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, images: Tensor) -> Tensor:
        """A few images from all over the dataset; the first of the batch where they cannot be had, or are of two sizes.

        Folders are read class by class, so that the first batch shows one class, and at batch size 1 one image.
        """
        pruner, loaders = self.pruner, trainer.val_dataloaders
        try:
            found = calibration_images(
                trainer, pl_module, loaders, _PICTURES, batch, pruner.images_from_batch, pruner.seed
            ).images
        except DataError:
            found = images
        same = found.shape[1:] == images.shape[1:]
        return (found if same else images)[:_PICTURES].to(images.device, images.dtype)

    def _traced(self, pl_module: L.LightningModule, images: Tensor, decided: Decided) -> dict[str, TokenTrace]:
        """One variant of each method in float: all at the largest target that they all reach, where there is one."""
        rows: dict[str, list[Planned]] = {}
        entries = {entry.name: entry for entry in self.entries if not entry.int8 and entry.method}
        for planned in decided.planned:
            if planned.timing is not None and planned.entry in entries:
                rows.setdefault(planned.entry, []).append(planned)
        shared = [s for s in self.speedups if all(s in {p.target for p in r} for r in rows.values() if r[0].schedule)]
        traces = {}
        for name, candidates in rows.items():
            chosen = next(
                (p for p in candidates if shared and p.target == shared[-1]), candidates[len(candidates) // 2]
            )
            reduction = reduction_of(chosen, entries[name])
            assert reduction is not None  # as every entry with a method and a timing has one
            counts = None if chosen.schedule is None else Schedule(chosen.schedule.removed)  # not for this batch size
            trace = trace_tokens(pl_module, images, reduction, counts, target=self.pruner.target)
            traces[chosen.variant] = TokenTrace(trace.groups.cpu(), trace.held.cpu(), trace.tokens.cpu(), trace.grid)
        return traces
