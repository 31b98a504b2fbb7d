"""One pruned run: decided on its first batch, compared with what its first step does, restored at its end."""

from dataclasses import replace
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_prune._utils.random_state import preserve_random_state
from lightning_prune.callbacks.batches import BatchShape, batch_shape
from lightning_prune.callbacks.call_watch import BlockInput, CallWatch, call_in_forward
from lightning_prune.callbacks.compiled_run import is_wrapped_by_compile
from lightning_prune.callbacks.config import PruningConfig
from lightning_prune.callbacks.decider import Decider
from lightning_prune.callbacks.decision import Decision
from lightning_prune.callbacks.first_batch import FirstBatch, can_run, open_first_batch
from lightning_prune.callbacks.first_call import FirstCall
from lightning_prune.callbacks.rank_agreement import on_rank_zero
from lightning_prune.callbacks.run_agreement import Agreed
from lightning_prune.errors import UnsupportedModelError
from lightning_prune.patching import PatchHandle
from lightning_prune.patching.input_resize import resize_of
from lightning_prune.patching.models.call_arguments import calling_with

_FEW = 0.1  # share of the images in a short last batch that says nothing against the latency of the others
_WAY_OUT = "`images_from_batch` can return what the transformer receives."
_WAY_OUT_OF_PRECISION = "`precision` of the Trainer can apply it to the whole step."


class PrunedRun:
    """A pruned run of a module, from its first batch to its end.

    The ranks agree twice: before the step of their first batch, and after it, when rank 0 has seen what the step passes
    to the transformer. Nothing is agreed inside the step, which some ranks may take another way through.

    Args:
        config: The settings.
        decider: Decides, on rank 0.

    Attributes:
        decision: What the run is pruned by; None where it is not.
        waits: Whether the decision has still to be made.
    """

    def __init__(self, config: PruningConfig, decider: Decider) -> None:
        self._config, self._decider = config, decider
        self.decision: Decision | None = None
        self.waits = True
        self._handle: PatchHandle | None = None
        self._watch: CallWatch | None = None
        self._first: FirstBatch | None = None  # until a step has called the transformer
        self._loaded: Tensor | None = None  # its images before the step, on rank 0
        self._measured: Tensor | None = None  # what was decided for, on rank 0; None where only its shape is known
        self._form: str | None = None  # of the first call in the step
        self._has_run_blocks = False  # in the step, outside a call of the transformer itself
        self._is_provisional = False  # whether the decision is of an earlier run, until the step has shown its call
        self._undecided: FirstCall | None = None  # that was not decided for; for the second agreement
        self._shape: BatchShape | None = None  # that later batches are compared with
        self._batches = float("inf")  # of the first loader
        self._warned: set[str] = set()

    def begin(self, trainer: L.Trainer, module: L.LightningModule, batch: Any) -> None:
        """Decides before the step of the first batch, where that is possible, and patches the module.

        Args:
            trainer: Whose loop runs.
            module: The module, dense.
            batch: As the step will receive it.

        Raises:
            PruneError: On every rank, whatever deciding raises on rank 0.
        """
        self._shape = batch_shape(batch, self._config.images_from_batch)
        self._batches = _batches_of_first_loader(trainer)
        with open_first_batch(trainer, module, batch, self._config) as first:
            self._first = first
            agreed = on_rank_zero(trainer, lambda: self._before_step(first))
        if not agreed.waits:
            self._patch(first, agreed)
        if trainer.is_global_zero and not is_wrapped_by_compile(module, first.transformer):
            self._watch = CallWatch(first.transformer, self._on_call, self._on_block)

    def check(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        """Looks at a later batch, before its step.

        Args:
            batch: As the step receives it. Warns, once, if it has another shape than the first one, unless it is a
                short last one that holds few of the images.
            batch_idx: Its index in its loader.
            dataloader_idx: Index of the loader; batches of the first one are compared.

        Raises:
            UnsupportedModelError: If the patch was removed or replaced.
        """
        if self._handle is not None and not self._handle.active:
            raise UnsupportedModelError(
                f"The patch of this run was removed or replaced before batch {batch_idx}; leave it in place until the "
                "run ends."
            )
        if self._first is not None:  # no step has called the transformer
            self._first = FirstBatch(self._first.trainer, self._first.module, batch, self._config)
            self._loaded, self._measured = None, None
        shape = batch_shape(batch, self._config.images_from_batch)
        if self._shape is None or self.waits or dataloader_idx or shape in (None, self._shape):
            return
        if shape is not None and self._is_short_remainder(shape, batch_idx):
            return
        rank_zero_warn(
            f"Batch {batch_idx} {self._shape.difference(shape)}. Pruning goes on, but its measured latency is for that "
            "size."
        )
        self._shape = None

    def _is_short_remainder(self, shape: BatchShape, batch_idx: int) -> bool:
        """Whether a batch is the last one, only smaller, and holds few of the images, as of nearly every dataset."""
        full = self._shape
        if full is None or batch_idx + 1 != self._batches or shape.images >= full.images:
            return False
        few = shape.images <= _FEW * (shape.images + batch_idx * full.images)
        return few and shape._replace(images=full.images) == full

    def after_step(self) -> None:
        """Ends the comparison with the first step; where that differed, all ranks of several take the new decision."""
        first = self._first
        if first is None:
            return
        if first.trainer.world_size > 1:
            self._end_watch()
            with open_first_batch(first.trainer, first.module, first.batch, first.config):
                agreed = on_rank_zero(first.trainer, lambda: self._after_step(first))
            if agreed.is_new:
                self._unpatch()
                self._patch(first, agreed)
        if self._watch is None or self._form is not None or self._has_run_blocks:
            self._first = None
            self._end_watch()

    def close(self) -> None:
        """Restores the model."""
        self._first = None
        self._end_watch()
        self._unpatch()

    def _before_step(self, first: FirstBatch) -> Agreed:
        decider = self._decider
        if decider.is_given:
            return Agreed(decider.decide(first))
        self._loaded = first.images.clone()  # a copy, since the step may change the images in place
        if is_wrapped_by_compile(first.module, first.transformer):
            return Agreed(decider.decide(first))
        is_alone = first.trainer.world_size == 1
        if decider.call_differs:
            if is_alone:
                return Agreed(waits=True)
            if decider.is_of(first.transformer):
                self._is_provisional = True
                return Agreed(decider.decision, decider.keywords)
        call = call_in_forward(first.module, first.transformer, first.images)
        if call is None or not call.is_repeatable:
            call = FirstCall.of(first.transformer.root, self._loaded)
        if is_alone and not decider.has_decided:
            with call.in_force(first.transformer.root):
                if not can_run(first.passing(call)):
                    return Agreed(waits=True)
        return self._decide_for(first, call)

    def _decide_for(self, first: FirstBatch, call: FirstCall, is_refuted: bool = False) -> Agreed:
        """Decides for what the step passes to the transformer."""
        loaded = self._loaded
        if not call.is_repeatable:  # other images cannot be passed with these arguments
            call = replace(call, keywords={})
        call, self._measured = replace(call, loaded=loaded), call.images
        same_form = loaded is not None and (call.images.shape, call.images.dtype) == (loaded.shape, loaded.dtype)
        is_same = same_form and loaded is not None and not call.changes(loaded)
        if not same_form:
            self._shape = None  # batches of other shapes may lead to the same of what is passed
        passed = first.passing(None if is_same else call)
        with preserve_random_state(), call.in_force(first.transformer.root):
            decision = self._decider.decide(passed.within(1.0) if is_refuted else passed, is_refuted)
        self._decider.keywords = dict(call.keywords)
        return Agreed(decision, self._decider.keywords)

    def _after_step(self, first: FirstBatch) -> Agreed:
        call, self._undecided = self._undecided, None
        if call is None:
            return Agreed(is_new=False)
        self._unpatch()
        if self._is_provisional:
            return self._decide_for(FirstBatch(first.trainer, first.module, first.batch, self._config), call)
        return self._decide_for(first, call, is_refuted=True)

    def _on_call(self, call: FirstCall) -> None:
        """Compares a call of the transformer with what was measured; where the run waits, measures it."""
        first = self._first
        if first is None:
            return
        if self._form is not None:
            if call.form != self._form:
                self._warn_once(
                    f"In one step the Vision Transformer receives {self._form}, and then {call.form}: the schedule and "
                    "its latency are for the former. A `schedule` that is a share of the tokens to keep, such as 0.7, "
                    "holds for every size."
                )
            return
        self._form = call.form
        if self.waits:
            first = FirstBatch(first.trainer, first.module, first.batch, self._config)  # nothing was measured so far
            self._patch(first, self._decide_for(first, call))
        if self._is_provisional:
            self._undecided = replace(call, images=call.images.clone())
            return
        if self.decision is None:
            return
        differences = call.differences(self.decision.context, self._measured, self._decider.keywords)
        if not differences:
            return
        text = f"The step passes {', '.join(differences)} to the Vision Transformer"
        is_precision = len(differences) == 1 and call.precision != self.decision.context.get("precision")
        way_out = _WAY_OUT_OF_PRECISION if is_precision else _WAY_OUT
        if self._decider.is_given or not call.is_repeatable:
            self._warn_once(f"{text}: the schedule and its latency are for what was measured. {way_out}")
            return
        left = first.limit.left()
        text += f": it is measured again with that, in the {left:.3g} s that are left of `time_limit`"
        self._decider.call_differs = True
        if first.trainer.world_size > 1:
            self._warn_once(f"{text}, after this batch, and the schedule is decided again. {way_out}")
            self._undecided = replace(call, images=call.images.clone())
            return
        self._warn_once(f"{text}, and the schedule is decided again. {way_out}")
        self._unpatch()
        self._patch(first, self._decide_for(first, call, is_refuted=True))

    def _on_block(self, block: BlockInput) -> None:
        """Compares what enters the blocks with what was measured, where the step does not call the transformer."""
        first = self._first
        if first is None:
            return
        if self.waits:  # no images reach the transformer: those of the batch are all that can be measured
            if not can_run(first):
                return
            first = FirstBatch(first.trainer, first.module, first.batch, self._config)
            with preserve_random_state():
                self._patch(first, Agreed(self._decider.decide(first)))
        if self._has_run_blocks or self.decision is None:
            return
        self._has_run_blocks = True
        context = self.decision.context
        is_scaled = resize_of(first.transformer.root) is not None  # then fewer tokens enter block 0
        measured = BlockInput(
            context.get("batch_size", block.images),
            self.decision.dense_tokens - (self.decision.schedule.removed[0] if is_scaled else 0),
            context.get("precision", block.precision),
        )
        if block != measured:
            self._warn_once(
                f"The blocks of the Vision Transformer receive {block.images} sequences of {block.tokens} tokens in "
                f"{block.precision} in the step, instead of {measured.images} of {measured.tokens} in "
                f"{measured.precision}, which were measured: the schedule and its latency are for the latter. Let the "
                "step call the transformer itself, or leave the run dense with `enabled=False`."
            )

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            rank_zero_warn(text)

    def _patch(self, first: FirstBatch, agreed: Agreed) -> None:
        self.waits = False
        self.decision = self._decider.decision = decision = agreed.decision
        if decision is not None and decision.prunes:
            with calling_with(first.transformer.root, agreed.keywords):  # which may let it take images of any size
                transformer = first.passing(None).transformer
                schedule, tail = decision.deployable(transformer), first.config.deployed_tail
                self._handle = PatchHandle(transformer, decision.reduction, schedule, tail=tail)

    def _unpatch(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def _end_watch(self) -> None:
        if self._watch is not None:
            self._watch.end()
        self._watch = None


def _batches_of_first_loader(trainer: L.Trainer) -> float:
    """The number of batches that the running loop reads of its first loader; infinite where that is not known."""
    counts: Any = trainer.num_val_batches
    if trainer.testing or trainer.predicting:
        counts = trainer.num_test_batches if trainer.testing else trainer.num_predict_batches
    return float(counts[0]) if counts else float("inf")
