"""What a comparison is asked for: the variants that are wanted, read from names of methods, targets and objectives."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, cast

from lightning_prune._utils.validation import check
from lightning_prune.callbacks import PruningConfig
from lightning_prune.errors import ArgumentError
from lightning_prune.patching.exact_tail import EXACT
from lightning_prune.planning import Objective, Utility
from lightning_prune.planning.method_selection import AUTO_METHODS
from lightning_prune.quantization import Int8Weights
from lightning_prune.reduction import POMT, Reduction, names, resolve
from lightning_prune.runtimes import Runtime, TorchEager, parse_runtime
from lightning_prune.schedule import ScheduleLike

DENSE_NAME, INT8_NAME, AUTO_NAME = "dense", "int8", "auto"
CONTROLS = ("random", "resize")  # what a method has to beat to be worth anything
_AND_INT8 = "+int8"


class VariantRequest(NamedTuple):
    """What is to be compared with dense: a method at target speed-ups, or one variant.

    Attributes:
        name: Its name, unique in a comparison: `pomt`, `int8`, `pomt+int8`, `auto accuracy budget`, `pomt given`.
        reduction: The reduction; None where no token is removed, the planner chooses it, or the schedule that was given
            names one for each block.
        int8: Whether the model runs in 8 bits.
        searched: The methods from which the planner chooses; empty where the method is fixed.
        objective: What its schedule is planned by; None where target speed-ups decide, or there is nothing to plan.
        schedule: The schedule that was given; None where it is planned.
        label: The method as the user calls it, where that is not the name.
        runtime: What executes the model.
        suffix: The end of its name that says the runtime; empty where there is one runtime only.
        exact: Whether it is the dense model with the exact tail.
        tail: As of `lightning_prune.patch`, for whatever removes tokens.
        is_control: Whether nobody named it: it is there for the others to be judged by.
    """

    name: str
    reduction: Reduction | None
    int8: bool
    searched: tuple[str, ...] = ()
    objective: Objective | None = None
    schedule: ScheduleLike | None = None
    label: str = ""
    runtime: Runtime = TorchEager()
    suffix: str = ""
    exact: bool = False
    tail: bool | None = None
    is_control: bool = False

    @property
    def stem(self) -> str:
        """Its name without the runtime."""
        return self.name.removesuffix(self.suffix)

    @property
    def is_dense(self) -> bool:
        """Whether it is the dense model."""
        return self.stem == DENSE_NAME

    @property
    def searches(self) -> bool:
        """Whether method and blocks are left to the planner."""
        return bool(self.searched)

    @property
    def execution(self) -> Runtime:
        """What executes it: in 8 bits the quantized form of the runtime, where that has a quantizer of its own."""
        return self.quantizing or self.runtime

    @property
    def quantizing(self) -> Runtime | None:
        """The quantized form of the runtime; None for floating point, and where the weights are quantized instead.

        Raises:
            RuntimeUnavailableError: If the quantizer of the runtime is not installed.
        """
        return self.runtime.quantized() if self.int8 else None

    @property
    def weights(self) -> type[Int8Weights] | None:
        """What makes the weights to run with; None for those of the model."""
        return Int8Weights if self.int8 and self.quantizing is None else None

    @property
    def method(self) -> str:
        """What the column `method` says."""
        if self.reduction is None and not (self.searches or self.exact) and self.schedule is None:
            return INT8_NAME if self.int8 else ""
        return (self.label or self.stem).removesuffix(_AND_INT8)

    @property
    def has_targets(self) -> bool:
        """Whether it is open how many tokens are removed, so that it has a variant for each target speed-up."""
        if self.objective is not None or self.schedule is not None:
            return False
        return self.searches or (self.reduction is not None and not self.reduction.adaptive)

    def planned_by(self, objective: Objective) -> "VariantRequest":
        """The one variant that an objective makes of this request."""
        return self._replace(name=f"{self.name} {_kind_of(objective)}", objective=objective, label=self.name)


@dataclass(frozen=True)
class ComparisonSettings:
    """What was asked for.

    Attributes:
        config: All settings of pruning.
        requests: What is compared in each runtime, dense first.
        runtimes: What executes the model.
        speedups: The targets, ascending; empty where there are none.
        output: Folder for what is written; None where nothing is.
        resume: Whether to go on from what is known there.
        limit_val_batches: Of the trainer.
    """

    config: PruningConfig
    requests: Sequence[VariantRequest]
    runtimes: Sequence[Runtime]
    speedups: Sequence[float]
    output: Path | None
    resume: bool
    limit_val_batches: int | float | None


def read_requests(
    config: PruningConfig,
    methods: Sequence[str | Reduction] | None,
    speedups: Sequence[float] | None,
    objective: Objective,
    controls: bool = False,
) -> list[VariantRequest]:
    """What a comparison consists of, dense first.

    Each method is planned for every target speed-up or, without `speedups`, by the objective. Without `methods` it is
    the method of the config. Without either, the POMT paper's own choice (its utility, alpha 0.5) is added, or a given
    schedule is the only variant. Controls are planned as the methods are, and stand after them.

    Args:
        config: Method, schedule and objective; its own reduction is meant by its name among `methods`.
        methods: Reductions and names: of reductions, `auto`, `dense`, `exact`, `int8`, and the others with `+int8`.
        speedups: The targets; None if there are none.
        objective: Plans the schedules where there are no targets.
        controls: Whether `controls_for` are added.

    Raises:
        ArgumentError: If there is no such method, one occurs twice, none is left to compare with dense, or a method in
            8 bits has no targets.
    """
    is_given = config.schedule != "auto"
    own = config.method if isinstance(config.method, Reduction) else None
    check("protocol", config.protocol, "'deployed' with `speedups`", speedups is None or config.protocol == "deployed")
    if methods is not None:
        requests = read_methods(methods, own)
    elif is_given and speedups is None:
        requests = [VariantRequest(DENSE_NAME, None, False)]
    else:
        requests = read_methods([config.method], None)
    added = controls_for(requests, own) if controls else []
    if speedups is None:
        for request in requests:
            valid = not (request.has_targets and request.int8)
            check("speedups", speedups, f"given for {request.name}, which is not planned by an objective", valid)
        requests = [request.planned_by(objective) if request.has_targets else request for request in requests]
        added = [control.planned_by(objective) for control in added]
    if methods is None and speedups is None and not is_given and not config.is_adaptive:
        paper = VariantRequest(POMT.name, POMT(), False).planned_by(Utility(0.5))
        if not any((each.reduction, each.objective) == (paper.reduction, paper.objective) for each in requests):
            requests.insert(1, paper)
    if is_given:
        reduction, label = None if config.is_mixed else config.reduction, config.label
        given = cast(Any, config.schedule)
        requests.append(VariantRequest(f"{label} given", reduction, False, schedule=given, label=label))
    requests += added
    names = [request.name for request in requests]
    return [
        request._replace(
            name=f"{request.label} {request.objective}" if names.count(request.name) > 1 else request.name,
            tail=config.deployed_tail,
        )
        for request in requests
    ]


def controls_for(requests: Sequence[VariantRequest], own: Reduction | None) -> list[VariantRequest]:
    """The controls that are missing among methods whose schedules are planned; none where nothing is planned.

    A schedule that was given, or that the images decide, has neither targets nor an objective, which a control could be
    planned by.

    Args:
        requests: The methods.
        own: The reduction that its name means, with its settings.

    Returns:
        In 8 bits only if all those methods are.

    Example:
        >>> from lightning_prune.comparison.requests import controls_for, read_methods
        >>> [request.name for request in controls_for(read_methods(["tome", "random"], own=None), own=None)]
        ['resize']
        >>> controls_for(read_methods(["int8"], own=None), own=None)
        []
    """
    planned = [request for request in requests if request.has_targets]
    int8 = all(request.int8 for request in planned)
    named = {request.reduction.name for request in planned if request.reduction is not None and request.int8 == int8}
    missing = [name for name in CONTROLS if planned and name not in named]
    return [_read(name + _AND_INT8 * int8, own)._replace(is_control=True) for name in missing]


def read_runtimes(runtimes: Sequence[str] | None, default: str) -> list[Runtime]:
    """The runtimes of a comparison.

    Args:
        runtimes: Specifications; None for the default.
        default: A specification.

    Raises:
        ArgumentError: If one is not known, occurs twice, runs converted models only, or there is none.
    """
    if runtimes is None:
        return [parse_runtime(default)]
    is_list = isinstance(runtimes, Sequence) and not isinstance(runtimes, str)
    check("runtimes", runtimes, "a list of at least one runtime", is_list and len(runtimes) > 0)
    found = [parse_runtime(runtime) for runtime in runtimes]
    check("runtimes", runtimes, "different from one another", len(set(found)) == len(found))
    return found


def in_runtimes(requests: Sequence[VariantRequest], runtimes: Sequence[Runtime]) -> list[VariantRequest]:
    """Each request in each runtime; where there are several, names end with the runtime in brackets.

    Args:
        requests: The requests of one runtime, dense first.
        runtimes: The runtimes.

    Example:
        >>> from lightning_prune.comparison.requests import in_runtimes, read_methods
        >>> from lightning_prune.runtimes import parse_runtime
        >>> runtimes = [parse_runtime("torch"), parse_runtime("torch.compile")]
        >>> [request.name for request in in_runtimes(read_methods(["tome"], own=None), runtimes)]
        ['dense [torch]', 'tome [torch]', 'dense [torch.compile]', 'tome [torch.compile]']
    """
    found = []
    for runtime in runtimes:
        suffix = f" [{runtime.name}]" if len(runtimes) > 1 else ""
        found += [r._replace(name=f"{r.name}{suffix}", runtime=runtime, suffix=suffix) for r in requests]
    return found


def read_methods(methods: Sequence[str | Reduction], own: Reduction | None) -> list[VariantRequest]:
    """The requests that names of methods stand for; dense comes first and is added where it is missing.

    Args:
        methods: Reductions and names: of reductions, `auto`, `dense`, `exact`, `int8`, and the others with `+int8`.
        own: The reduction that its name means, with its settings.

    Raises:
        ArgumentError: If there is no such method (suggests the nearest), one occurs twice, or none is left to compare
            with dense.

    Example:
        >>> from lightning_prune.comparison.requests import read_methods
        >>> [request.name for request in read_methods(["pomt+int8", "int8"], own=None)]
        ['dense', 'pomt+int8', 'int8']
    """
    if isinstance(methods, str) or not isinstance(methods, Sequence) or not methods:
        raise ArgumentError(f"`methods` must be a list of names, got {methods!r}.")
    read = [_read(name, own) for name in methods if not (isinstance(name, str) and name == DENSE_NAME)]
    names = [request.name for request in read]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise ArgumentError(f"`methods` must differ from one another, got {repeated!r} twice.")
    if not read:
        raise ArgumentError(f"`methods` must name one to compare with dense, got {list(methods)!r}.")
    return [VariantRequest(DENSE_NAME, None, False), *read]


def _read(name: object, own: Reduction | None) -> VariantRequest:
    if isinstance(name, Reduction):
        return VariantRequest(name.name, name, False)
    if not isinstance(name, str):
        raise ArgumentError(f"`methods` must hold names and reductions, got {name!r}.")
    if name == INT8_NAME:
        return VariantRequest(name, None, True)
    plain = name.removesuffix(_AND_INT8)
    if plain == AUTO_NAME:
        return VariantRequest(name, None, name != plain, AUTO_METHODS)
    if plain == EXACT:
        return VariantRequest(name, None, name != plain, exact=True)
    try:
        reduction = own if own is not None and plain == own.name else resolve(plain)
    except ArgumentError as error:
        known = names()
        if plain in known:  # it exists, but needs what a name cannot say, as a vocabulary
            raise
        near = get_close_matches(plain.lower(), [*known, AUTO_NAME, DENSE_NAME, EXACT, INT8_NAME], n=1)
        with_int8 = name != plain
        meant = [
            close + _AND_INT8 * with_int8 if close in (*known, AUTO_NAME, EXACT) else INT8_NAME if with_int8 else close
            for close in near
        ]
        hint = f" Did you mean {meant[0]!r}?" if meant else ""
        listed = ", ".join([DENSE_NAME, *known, AUTO_NAME, EXACT, INT8_NAME])
        raise ArgumentError(
            f"`methods` must be of {listed}, or two of them as pomt+int8; got {name!r}.{hint}"
        ) from error
    return VariantRequest(name, reduction, name != plain)


def _kind_of(objective: Objective) -> str:
    """The class of an objective in words: of `LatencyBudget` "latency budget"."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", type(objective).__name__).lower()
