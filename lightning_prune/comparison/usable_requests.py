"""Which requests of a comparison the model can meet, and how much of the time each of them gets."""

from collections.abc import Collection
from dataclasses import dataclass

from lightning_prune.callbacks.first_batch import FirstBatch
from lightning_prune.comparison.compared_method import ComparedMethod
from lightning_prune.comparison.objective_planning import ObjectiveGroup, objective_groups
from lightning_prune.comparison.requests import ComparisonSettings, VariantRequest
from lightning_prune.comparison.time_shares import SHARES
from lightning_prune.errors import UnsupportedModelError


@dataclass(frozen=True)
class UsableRequests:
    """The requests of a comparison, with what is known of them before anything is planned.

    Attributes:
        requests: All of them, in the order of the table.
        groups: Those with an objective, in groups that are planned together.
        methods: Request -> its method, where neither an objective nor a given schedule decides.
        unusable: Request -> why the model cannot be run with that method; None where it can.
        num_given: Number of requests whose schedule was given.
        left_out: Control that the model does not support -> why; none of `requests`.
    """

    requests: list[VariantRequest]
    groups: list[ObjectiveGroup]
    methods: dict[str, ComparedMethod]
    unusable: dict[str, str | None]
    num_given: int
    left_out: dict[str, str]

    @classmethod
    def of(
        cls, first: FirstBatch, settings: ComparisonSettings, tokens: int, given: Collection[str]
    ) -> "UsableRequests":
        """Asks each method whether it can be used with this model.

        Args:
            first: The first batch.
            settings: What was asked for.
            tokens: N.
            given: Names of the requests whose schedule was given.

        Raises:
            UnsupportedModelError: If no method can be used with this model; says why for each.
        """
        block = 0.25 if settings.config.block == "auto" else settings.config.block
        grid = first.transformer.grid(first.images)

        def methods_of(requests: list[VariantRequest]) -> dict[str, ComparedMethod]:
            return {r.name: ComparedMethod(first.transformer, r, tokens, block, grid) for r in requests}

        def reasons(methods: dict[str, ComparedMethod]) -> dict[str, str | None]:
            return {name: method.unsupported_reason(first.images) for name, method in methods.items()}

        of_controls = reasons(methods_of([request for request in settings.requests if request.is_control]))
        left_out = {name: reason for name, reason in of_controls.items() if reason is not None}
        requests = [request for request in settings.requests if request.name not in left_out]
        groups = objective_groups(settings.config, requests)
        known = {*given, *(request.name for group in groups for request in group.requests)}
        methods = methods_of([r for r in requests if not r.is_dense and r.name not in known])
        found = cls(requests, groups, methods, reasons(methods), len(given), left_out)
        if not known and all(request.is_control for request in found.usable):
            refused = {**found.unusable, **left_out}
            why = "; ".join(f"{name}: {reason}" for name, reason in refused.items() if reason is not None)
            raise UnsupportedModelError(f"None of the methods can be used with this model. {why}")
        return found

    @property
    def usable(self) -> list[VariantRequest]:
        """Those with a method that the model can be run with."""
        return [r for r in self.requests if r.name in self.methods and self.unusable[r.name] is None]

    def variants(self, runtimes: int, targets: int) -> int:
        """The number of variants that are timed at last, if every target is reached.

        Args:
            runtimes: Number of runtimes, each with a dense model.
            targets: Number of target speed-ups.
        """
        with_targets = sum(request.has_targets for request in self.usable)
        single = len(self.usable) - with_targets + self.num_given + sum(len(group.requests) for group in self.groups)
        return runtimes + single + with_targets * targets

    def weights(self, runtimes: int, targets: int) -> dict[str, float]:
        """Task after the latency curve -> its weight, the final run last; see `TimeShares`.

        Args:
            runtimes: Number of runtimes.
            targets: Number of target speed-ups.
        """
        weights = {}
        for group in self.groups:
            further = len(group.config.methods) + len(group.requests) - 2
            is_control = all(request.is_control for request in group.requests)
            weights[group.name] = SHARES.control if is_control else SHARES.method + SHARES.further * further
        for request in self.usable:
            if request.has_targets:
                further = max(len(request.searched) - 1, 0)
                own = SHARES.control if request.is_control else SHARES.method
                weights[request.name] = own + SHARES.further * further
        return {**weights, "final": SHARES.method + SHARES.variant * self.variants(runtimes, targets)}
