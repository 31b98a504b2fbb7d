"""Whether the decision of an earlier run holds for the present one: same model, same conditions, same accuracy."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self
from weakref import ReferenceType, ref

from torch import nn

from lightning_prune._utils.digests import tensor_digest, weights_digest
from lightning_prune._utils.isolation import user_hooks
from lightning_prune.callbacks.batches import Calibration
from lightning_prune.callbacks.decision import Decision
from lightning_prune.callbacks.first_batch import FirstBatch
from lightning_prune.callbacks.planned_schedule import proxy_for
from lightning_prune.patching import PatchHandle
from lightning_prune.profiling import Proxy
from lightning_prune.profiling.environment import model_conditions
from lightning_prune.profiling.measurement import ready_to_run
from lightning_prune.runtimes.torch_runtime import runtime_of

_IMAGES = 64  # on which the accuracy is estimated anew: two passes over them


@dataclass(frozen=True)
class DecisionConditions:
    """What a decision depends on.

    Attributes:
        root: The model object.
        latency: The conditions of its latency, as plain values.
        objects: What plain values cannot say, compared by identity: the user's hooks, and what `torch.compile` made.
            Weak references, so that no model is kept alive.
        accuracy: A digest of the weights and of the images of the first batch; empty where no accuracy was estimated.
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
        compiled = transformer.compiled_root
        is_users = runtime_of(compiled) is None  # what this package compiled, its runtime says
        graph = filter(None, [getattr(compiled, "_compiled_call_impl", None)]) if is_users else ()
        return cls(
            root=ref(transformer.root),
            latency=model_conditions(transformer, first.images),
            objects=tuple(map(ref, (*user_hooks(transformer.root), compiled, *graph))),
            accuracy=f"{weights_digest(transformer.root)} {tensor_digest(first.images)}"
            if first.config.is_planned
            else "",
        )

    def same_latency(self, other: "DecisionConditions") -> bool:
        """Whether what was measured under other conditions holds under these."""
        same_objects = len(self.objects) == len(other.objects) and all(
            mine() is not None and mine() is theirs() for mine, theirs in zip(self.objects, other.objects, strict=True)
        )
        return self.root == other.root and self.latency == other.latency and same_objects


def checked_anew(first: FirstBatch, decision: Decision) -> Decision | None:
    """A planned decision with its accuracy estimated anew, if the objective tolerates it; None if it does not.

    For a run of the same model with other weights or other images.

    Nothing is timed, as latency does not depend on them. A decision that removes nothing is never kept: other weights
    may tolerate more.

    Args:
        first: The first batch of the present run, with the model dense.
        decision: Of an earlier run.
    """
    plan = decision.plan
    if plan is None or not plan.total_removed or first.config.protocol == "paper":
        return None
    calibration = first.calibration()
    accuracy, images = _accuracy(first, calibration, decision)
    if not plan.objective.tolerates(accuracy, plan.accuracy):
        return None
    note = f"Here it keeps {accuracy:.2%} of the {plan.proxy}, on {images} images."
    reason = f"{plan.reason.split(_SEPARATOR)[0]}{_SEPARATOR}{note}"
    return replace(decision, reason=reason, plan=replace(plan, accuracy=accuracy, reason=reason))


_SEPARATOR = " Planned for other weights or images. "


def _accuracy(first: FirstBatch, calibration: Calibration, decision: Decision) -> tuple[float, int]:
    """The proxy of the decided schedule in this run, and on how many images."""
    transformer, images = first.transformer, calibration.images[:_IMAGES]
    proxy_name = proxy_for(first.config, transformer, calibration)
    with ready_to_run(transformer):
        size = max(len(first.images), 32)
        proxy = Proxy(transformer, images, first.images.device, size, None, proxy=proxy_name)
        with PatchHandle(transformer, decision.reduction, decision.schedule):
            return proxy.measure(), len(images)
