"""From the names of methods, targets and runtimes to what a comparison consists of."""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, cast

from lightning_prune._utils.validation import check
from lightning_prune.callbacks import PruningConfig
from lightning_prune.comparison.requests import AND_INT8, DENSE_NAME, INT8_NAME, VariantRequest
from lightning_prune.errors import ArgumentError
from lightning_prune.patching.exact_tail import EXACT
from lightning_prune.planning import Objective, Utility
from lightning_prune.planning.method_selection import AUTO_METHODS
from lightning_prune.reduction import POMT, Reduction, names, resolve
from lightning_prune.runtimes import Runtime, parse_runtime

AUTO_NAME = "auto"
CONTROLS = ("random", "resize")  # what a method has to beat to be worth anything


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
        >>> from lightning_prune.comparison.request_reading import controls_for, read_methods
        >>> [request.name for request in controls_for(read_methods(["tome", "random"], own=None), own=None)]
        ['resize']
        >>> controls_for(read_methods(["int8"], own=None), own=None)
        []
    """
    planned = [request for request in requests if request.has_targets]
    int8 = all(request.int8 for request in planned)
    named = {request.reduction.name for request in planned if request.reduction is not None and request.int8 == int8}
    missing = [name for name in CONTROLS if planned and name not in named]
    return [_read(name + AND_INT8 * int8, own)._replace(is_control=True) for name in missing]


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
        >>> from lightning_prune.comparison.request_reading import in_runtimes, read_methods
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
        >>> from lightning_prune.comparison.request_reading import read_methods
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
    plain = name.removesuffix(AND_INT8)
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
            close + AND_INT8 * with_int8 if close in (*known, AUTO_NAME, EXACT) else INT8_NAME if with_int8 else close
            for close in near
        ]
        hint = f" Did you mean {meant[0]!r}?" if meant else ""
        listed = ", ".join([DENSE_NAME, *known, AUTO_NAME, EXACT, INT8_NAME])
        raise ArgumentError(
            f"`methods` must be of {listed}, or two of them as pomt+int8; got {name!r}.{hint}"
        ) from error
    return VariantRequest(name, reduction, name != plain)
