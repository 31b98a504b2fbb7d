"""The settings of `TokenPruning`: one frozen object that validates itself and that every helper takes."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, cast, get_args

from torch import Tensor

from lightning_prune._utils.validation import check, check_bool, check_choice, check_int, check_positive, is_int
from lightning_prune.errors import ArgumentError
from lightning_prune.patching.schedule_forms import check_named_method, reductions_of
from lightning_prune.patching.token_readers import RestoreMode, check_restore
from lightning_prune.planning import AUTO_METHODS, AccuracyBudget, Objective
from lightning_prune.profiling import ProfileStore
from lightning_prune.profiling.clocks import CLOCKS
from lightning_prune.profiling.measurement import ProfilingMode
from lightning_prune.profiling.output_kinds import PROXIES
from lightning_prune.reduction import Reduction, resolve
from lightning_prune.runtimes import parse_runtime
from lightning_prune.schedule import KeepRates, MethodSpec, Schedule, ScheduleLike, read_schedule

DEFAULT_OBJECTIVE = AccuracyBudget(0.005)

_BLOCK = 0.25  # of the depth: the POMT paper's block
_FALLBACK = "tome"  # the method of counts that name none


@dataclass(frozen=True, kw_only=True, eq=False)
class PruningConfig:
    """The settings of a `TokenPruning` callback; see there for the arguments.

    After construction `method` is `"auto"` or a `Reduction`, and `schedule` is `"auto"`, a number, a `Schedule` or
    `KeepRates`: names are resolved and files are read. `runtime` is the canonical spec.

    Raises:
        ArgumentError: If a setting is unusable, whatever the model and the data are, or has no effect with another one.
        ScheduleError: If `schedule` is a list that is not a schedule.
        FileFormatError: If `schedule` is a path of a file that holds none.

    Example:
        >>> from dataclasses import replace
        >>> from lightning_prune.callbacks import PruningConfig
        >>> config = PruningConfig(method="tome", schedule=56)
        >>> replace(config, schedule=64).schedule, config.label
        (64, 'tome')
    """

    method: str | Reduction = "auto"
    schedule: Literal["auto"] | ScheduleLike = "auto"
    objective: Objective | None = None
    block: int | float | Literal["auto"] = _BLOCK
    calibration: Any = 512
    images_from_batch: Callable[[Any], Tensor] | None = None
    time_limit: float = 60.0
    module_path: str | None = None
    proxy: str = "auto"
    protocol: ProfilingMode = "deployed"
    use_cache: bool = True
    cache_dir: str | Path | None = None
    runtime: str = "torch"
    clock: str = "wall"
    seed: int = 0
    verbose: bool = True
    tail: bool | None = None
    restore: RestoreMode | None = None

    def __post_init__(self) -> None:
        """Checks the settings, resolves the method and reads the schedule."""
        check_positive("time_limit", self.time_limit, "a number of seconds")
        check_int("seed", self.seed, 0)
        check_bool("use_cache", self.use_cache)
        check_bool("verbose", self.verbose)
        check("tail", self.tail, "True, False or None", self.tail is None or isinstance(self.tail, bool))
        check_restore(self.restore)
        check_choice("proxy", self.proxy, PROXIES)
        check_choice("protocol", self.protocol, get_args(ProfilingMode))
        check_choice("clock", self.clock, list(CLOCKS))
        path, folder, extract = self.module_path, self.cache_dir, self.images_from_batch
        check("module_path", path, "a dotted path or None", path is None or isinstance(path, str))
        check("cache_dir", folder, "a folder or None", folder is None or isinstance(folder, str | PathLike))
        check("images_from_batch", extract, "a function or None", extract is None or callable(extract))
        self._check_objective()
        self._check_calibration()
        self._check_block()
        object.__setattr__(self, "runtime", parse_runtime(self.runtime).name)
        object.__setattr__(self, "method", "auto" if self.method == "auto" else resolve(self.method))
        object.__setattr__(self, "schedule", "auto" if self.schedule == "auto" else read_schedule(self.schedule))
        self._check_together()

    @property
    def effective_objective(self) -> Objective:
        """The objective to plan by: the stated one, or the default, a budget of half a percent."""
        return DEFAULT_OBJECTIVE if self.objective is None else self.objective

    @property
    def reduction(self) -> Reduction:
        """The stated method, else that of the given schedule, else ToMe, for counts that name no method.

        Raises:
            ArgumentError: If several methods are searched, or the schedule names several.
        """
        if isinstance(self.method, Reduction):
            return self.method
        if self.schedule == "auto":
            raise ArgumentError("`method` must be one method here, got 'auto', which only planning can use.")
        named = self._named
        check("schedule", self.schedule, "one with the same method in all blocks here", not isinstance(named, tuple))
        return resolve(_FALLBACK if named is None else cast(MethodSpec, named))

    @property
    def methods(self) -> tuple[str | Reduction, ...]:
        """The methods that are searched."""
        return AUTO_METHODS if self.method == "auto" else (self.method,)

    @property
    def label(self) -> str:
        """Name of the method; `"auto"` where methods are searched, `"mixed"` where the schedule names several."""
        if self._searches_methods:
            return "auto"
        return "mixed" if self.is_mixed else self.reduction.name

    @property
    def reducing_block(self) -> int | float:
        """The reducing block, as an index or a fraction of the depth.

        Raises:
            ArgumentError: If blocks are searched.
        """
        if self.block == "auto":
            raise ArgumentError(
                "`block` must be an index or a fraction of the depth here, got 'auto', which only planning can use."
            )
        return self.block

    @property
    def plans_blocks(self) -> bool:
        """Whether the planner searches over blocks, and perhaps over methods."""
        return self._searches_methods or self.block == "auto"

    @property
    def uses_token_curve(self) -> bool:
        """Whether latency is profiled against the token count alone, since there is no single method and block."""
        return self.plans_blocks or self.is_mixed

    @property
    def is_adaptive(self) -> bool:
        """Whether the images decide how many tokens are removed, so that there is nothing to plan."""
        return isinstance(self.method, Reduction) and self.method.adaptive

    @property
    def is_mixed(self) -> bool:
        """Whether the given schedule names different methods for its blocks."""
        return isinstance(self._named, tuple)

    @property
    def is_planned(self) -> bool:
        """Whether a schedule has to be planned."""
        return self.schedule == "auto" and not self.is_adaptive

    @property
    def deployed_tail(self) -> bool | None:
        """`tail` of `lightning_prune.patch` for what runs; the paper's protocol has none."""
        return False if self.protocol == "paper" else self.tail

    def store(self) -> ProfileStore | None:
        """Where latency profiles are kept; None where they are not."""
        return ProfileStore(self.cache_dir) if self.use_cache else None

    @property
    def _named(self) -> MethodSpec | tuple[MethodSpec | None, ...] | None:
        """The method that the given schedule names, or one for each block where they differ."""
        return self.schedule.method if isinstance(self.schedule, Schedule | KeepRates) else None

    @property
    def _searches_methods(self) -> bool:
        return not isinstance(self.method, Reduction) and self.schedule == "auto"

    def _check_objective(self) -> None:
        valid = self.objective is None or isinstance(self.objective, Objective)
        check("objective", self.objective, "an Objective such as AccuracyBudget(0.005), or None", valid)

    def _check_calibration(self) -> None:
        value = self.calibration
        valid = is_int(value, 1) or (isinstance(value, Iterable) and not isinstance(value, str | bytes))
        check("calibration", value, "a number of images >= 1, a tensor of images or a loader", valid)

    def _check_block(self) -> None:
        value = self.block
        valid = value == "auto" or is_int(value, 0) or (isinstance(value, float) and 0 <= value < 1)
        check("block", value, "an index >= 0, a fraction of the depth in [0, 1) or 'auto'", valid)

    def _check_named_methods(self) -> None:
        """Refuses a schedule that names an unknown method, or another one than `method`."""
        if not isinstance(self.schedule, Schedule | KeepRates) or self.schedule.method is None:
            return
        if not isinstance(self.method, Reduction):
            reductions_of(self.schedule)
        elif not self.method.adaptive:
            check_named_method(self.schedule, self.method)

    def _check_together(self) -> None:
        """Refuses settings that have no effect together."""
        block, schedule = self.block, self.schedule
        self._check_named_methods()
        if self._searches_methods:
            valid = block in (_BLOCK, "auto")
            check("block", block, "left out with method='auto', which searches all blocks", valid)
        elif block == "auto":
            check("block", block, "left out with a schedule that names several methods", not self.is_mixed)
            method = self.reduction
            valid = method.site == "block" and not method.adaptive
            check("block", block, f"left out with {method.name}, which does not act in blocks that are searched", valid)
        if self.restore is not None:
            check("protocol", self.protocol, "'deployed' with `restore`", self.protocol == "deployed")
        if self.is_adaptive:
            label = f"left out with {self.label}, where the images decide how many tokens are removed"
            check("schedule", schedule, label, schedule == "auto")
            check("objective", self.objective, label, self.objective is None)
            check("protocol", self.protocol, label, self.protocol == "deployed")
        elif self.plans_blocks:
            searched = "method" if self._searches_methods else "block"
            check("schedule", schedule, f"left out with {searched}='auto', which plans one", schedule == "auto")
            check("protocol", self.protocol, f"'deployed' with {searched}='auto'", self.protocol == "deployed")
