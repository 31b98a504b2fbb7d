"""Whether the decision of an earlier run holds for the present one: same model, same conditions, same accuracy."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self
from weakref import ReferenceType, ref

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_prune._utils.digests import tensor_digest, weights_digest
from lightning_prune._utils.isolation import user_hooks
from lightning_prune.callbacks.decision import Decision
from lightning_prune.callbacks.first_batch import FirstBatch
from lightning_prune.callbacks.planned_schedule import proxy_for
from lightning_prune.errors import DataError
from lightning_prune.patching import PatchHandle
from lightning_prune.planning.api import shuffled
from lightning_prune.planning.reasons import dense_reason
from lightning_prune.profiling import Estimate, Proxy
from lightning_prune.profiling.environment import model_conditions
from lightning_prune.profiling.measurement import ready_to_run
from lightning_prune.profiling.model_identity import replaced_methods
from lightning_prune.profiling.output_kinds import OUTPUT_KINDS
from lightning_prune.runtimes.base import runtime_of
from lightning_prune.schedule import Schedule

_IMAGES = 64  # on which the accuracy is estimated again: two passes over them


@dataclass(frozen=True)
class DecisionConditions:
    """What a decision depends on.

    Attributes:
        root: The model object.
        latency: The conditions of its latency, as plain values.
        objects: What plain values cannot say, compared by identity: the user's hooks, methods that were replaced, and
            what `torch.compile` made. Weak references, so that no model is kept alive.
        accuracy: A digest of the weights and of the images of the first batch; empty for a given schedule, which
            depends on neither.
    """

    root: ReferenceType[nn.Module]
    latency: Mapping[str, Any]
    objects: tuple[ReferenceType[Any], ...]
    accuracy: str

    @classmethod
    def of(cls, first: FirstBatch) -> Self:
        """The conditions of the present run.

        Args:
            first: Its first batch, with the model dense.
        """
        transformer = first.transformer
        root, outer, compiled = transformer.root, transformer.outer, transformer.compiled_root
        depends = first.config.is_planned or first.config.is_adaptive
        is_users = runtime_of(compiled) is None  # what this package compiled, its runtime says
        graph = filter(None, [getattr(compiled, "_compiled_call_impl", None)]) if is_users else ()
        return cls(
            root=ref(root),
            latency=model_conditions(transformer, first.images),
            objects=tuple(map(ref, (*user_hooks(outer), *replaced_methods(outer), compiled, *graph))),
            accuracy=f"{weights_digest(outer)} {tensor_digest(first.images)}" if depends else "",
        )

    def same_latency(self, other: "DecisionConditions") -> bool:
        """Whether what was measured under other conditions holds under these."""
        same_objects = len(self.objects) == len(other.objects) and all(
            mine() is not None and mine() is theirs() for mine, theirs in zip(self.objects, other.objects, strict=True)
        )
        return self.root == other.root and self.latency == other.latency and same_objects


def checked_anew(first: FirstBatch, decision: Decision) -> Decision | None:
    """A decision of a run with other weights or images, if it holds for this one as well; None if it does not.

    The accuracy of the schedule is estimated again, and the objective has to tolerate it. Nothing is timed, as latency
    does not depend on weights. Where the device gains nothing from fewer tokens, that holds for all weights; another
    decision that removes nothing does not, as other weights may tolerate more.

    Args:
        first: The first batch of the present run, with the model dense.
        decision: Of an earlier run.
    """
    plan, config = decision.plan, first.config
    if plan is None or config.protocol == "paper":
        return None
    if not plan.total_removed:
        return decision if dense_reason(plan.profile) is not None else None
    try:
        count = min(config.calibration, _IMAGES) if isinstance(config.calibration, int) else config.calibration
        calibration = first.sample(count)
        proxy_name = proxy_for(config, first.module, first.transformer, calibration)
        if OUTPUT_KINDS[proxy_name].label != plan.proxy:  # the targets of this run are of another kind
            return None
        images = shuffled(calibration.images, config.seed)[:_IMAGES]
        accuracy = _accuracy(first, images, decision, proxy_name)
    except DataError as error:
        rank_zero_warn(f"The schedule of an earlier run stays, but its accuracy cannot be estimated here: {error}")
        return decision
    if not plan.objective.tolerates(accuracy, plan.accuracy):
        return None
    note = f"Here it keeps {accuracy} of the {plan.proxy}, on {len(images)} images."
    return replace(decision, reason=f"{plan.reason} Planned for other weights or images. {note}")


def _accuracy(first: FirstBatch, images: Tensor, decision: Decision, proxy_name: str) -> Estimate:
    """The proxy of the decided schedule in this run."""
    transformer = first.transformer
    with ready_to_run(transformer):
        size = max(len(first.images), 32)
        proxy = Proxy(transformer, images, first.images.device, size, None, proxy=proxy_name)
        counts = Schedule(decision.schedule.removed, decision.schedule.method)  # without what it was made on
        with PatchHandle(transformer, decision.reduction, counts):
            return proxy.measure()
