"""The plot of a latency profile, and `plot`, which draws everything that has a plot."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_prune._utils.formatting import context_line, model_title, timed_quantity
from lightning_prune._utils.validation import check, check_path
from lightning_prune.errors import ArgumentError
from lightning_prune.planning.latency_model import removes_before_blocks
from lightning_prune.planning.results import Plan
from lightning_prune.profiling.latency_profile import LatencyProfile
from lightning_prune.report.pareto import plot_pareto
from lightning_prune.report.plan_plot import plot_plan
from lightning_prune.report.styles import line_styles, save_figure

_BLUE, _RED, _GREY = "#1f5fa8", "#c0392b", "#7f8c8d"  # readable in print and with red-green blindness


def plot_profile(profile: LatencyProfile, others: Sequence[LatencyProfile] = ()) -> Figure:
    """Draws latency against tokens between its quartiles, the cliffs and the plateaus.

    With several profiles a second panel shows each latency over that of the dense model in the same runtime, where
    their shapes can be compared, and cliffs are marked on the curves.

    Args:
        profile: The profile.
        others: Profiles of the same model in other runtimes.
    """
    figure = Figure(figsize=(7.5, 8.0 if others else 4.6), layout="constrained")
    panels = list(figure.subplots(2 if others else 1, 1, squeeze=False, sharex=True)[:, 0])
    simulated = profile.context.get("device_type") == "simulated"
    source = "simulated" if simulated else "measured"
    styles = line_styles([_runtime(each) for each in (profile, *others)])
    for each in (profile, *others):
        color, label = (styles[_runtime(each)][0], f"{source}, {_runtime(each)}") if others else (_BLUE, source)
        _draw_curve(panels[0], each, color, label)
        if others:
            _draw_shape(panels[1], each, color)
    if not others:
        _draw_structure(panels[0], profile)
    quantity = timed_quantity(profile.context)
    panels[0].set_ylabel(f"{quantity} of a batch [ms], {source}")
    if others:
        n = profile.dense_tokens
        panels[1].plot([0, n], [0, 100], color=_GREY, linewidth=0.8, linestyle="--", label="proportional to the tokens")
        panels[1].set_xlim(left=max(min(each.tokens[0] for each in (profile, *others)) - 0.03 * n, 0))
        panels[1].set_ylabel(f"{quantity} [% of dense in the same runtime]")
    for axes in panels:
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
    everywhere = removes_before_blocks(profile)
    panels[-1].set_xlabel("tokens in every block" if everywhere else "tokens that leave the last reducing block")
    figure.legend(fontsize=8, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(_title(profile, runtimes=len(others) + 1), fontsize=10)
    return figure


def _runtime(profile: LatencyProfile) -> str:
    return str(profile.context.get("runtime", "torch"))


def _draw_curve(axes: Axes, profile: LatencyProfile, color: str, label: str) -> None:
    tokens, latency = np.array(profile.tokens), np.array(profile.milliseconds)
    axes.plot(tokens, latency, color=color, marker=".", linewidth=1.4, label=label)
    low, high = np.array(profile.low_ms), np.array(profile.high_ms)
    if (high > low).any():  # neither of profiles without quartiles, nor of single rounds
        axes.fill_between(tokens, low, high, color=color, alpha=0.18, linewidth=0, label=f"quartiles, {label}")


def _draw_shape(axes: Axes, profile: LatencyProfile, color: str) -> None:
    """The curve over its dense latency; cliffs are thick and red."""
    share = 100 * np.array(profile.milliseconds) / profile.dense_ms
    axes.plot(profile.tokens, share, color=color, marker=".", linewidth=1.4)
    at = dict(zip(profile.tokens, share, strict=True))
    for cliff in profile.cliffs():
        ends = [cliff.below, cliff.above]
        label = None if "cliff" in axes.get_legend_handles_labels()[1] else "cliff"
        axes.plot(ends, [at[end] for end in ends], color=_RED, linewidth=4.0, alpha=0.6, label=label)


def _draw_structure(axes: Axes, profile: LatencyProfile) -> None:
    """A straight line between the ends, and the cliffs and plateaus."""
    if len(profile.tokens) > 1:
        ends = [profile.tokens[0], profile.tokens[-1]], [profile.milliseconds[0], profile.milliseconds[-1]]
        axes.plot(*ends, color=_GREY, linewidth=0.8, linestyle="--", label="straight line between the ends")
    for number, cliff in enumerate(profile.cliffs()):
        label = "cliff" if number == 0 else None
        axes.axvspan(cliff.below, cliff.above, color=_RED, alpha=0.25, linewidth=0, label=label)
    for number, flat in enumerate(profile.plateaus()):
        label = "plateau" if number == 0 else None
        axes.axvspan(flat.below, flat.above, color=_GREY, alpha=0.15, linewidth=0, label=label)


def _title(profile: LatencyProfile, runtimes: int = 1) -> str:
    context = profile.context
    if runtimes > 1:
        context = {key: value for key, value in context.items() if key != "runtime"} | {"compiled": False}
    if removes_before_blocks(profile):
        what = f"{timed_quantity(context)} against token count (random tokens dropped before block 0)"
    else:
        what = f"{timed_quantity(context)} with {profile.method} from block {profile.block}"
    return f"{model_title(context)}: {what}\n{context_line(context)}"


class _HasDocument(Protocol):
    """The result of a comparison, which writes itself as the document `results.json`."""

    def to_dict(self) -> dict[str, Any]: ...


def plot(
    result: LatencyProfile | Plan | _HasDocument | Mapping[str, Any],
    path: str | Path | None = None,
    *,
    others: Sequence[LatencyProfile] = (),
) -> Figure:
    """Draws a latency profile, a plan, or a comparison.

    Args:
        result: A profile: latency against tokens. A plan: accuracy against speed-up of the candidates of each method,
            and the chosen schedule. A comparison, or the document that it writes as `results.json`: accuracy against
            latency.
        path: File to write, in the format of its suffix; it appears whole or not at all. None: only the figure.
        others: With a profile: profiles of the same model in other runtimes, drawn in the same axes.

    Returns:
        The figure.

    Raises:
        ArgumentError: If `result` is none of these, or `others` are given with anything but a profile.
        DataError: If the document of a comparison has no rows.

    Example:
        >>> from lightning_prune.profiling import LatencyProfile
        >>> profile = LatencyProfile((60, 197), (5.0, 10.0), (0.1, 0.1), (9, 9), "random", 0, 12)
        >>> plot(profile).axes[0].get_ylabel()
        'latency of a batch [ms], measured'
    """
    if others and not isinstance(result, LatencyProfile):
        raise ArgumentError(f"`others` must come with a LatencyProfile, got {type(result).__name__}.")
    valid = isinstance(others, list | tuple) and all(isinstance(each, LatencyProfile) for each in others)
    check("others", others, "a list of LatencyProfiles", valid)
    if path is not None:
        check_path("path", path)
    figure = _draw(result, others)
    if path is not None:
        save_figure(figure, path)
    return figure


def _draw(result: Any, others: Sequence[LatencyProfile]) -> Figure:
    if isinstance(result, LatencyProfile):
        return plot_profile(result, others)
    if isinstance(result, Plan):
        return plot_plan(result)
    if isinstance(result, Mapping):
        return plot_pareto(result)
    if hasattr(result, "to_dict"):
        return plot_pareto(result.to_dict())
    raise ArgumentError(f"`result` must be a LatencyProfile, a Plan or a comparison, got {type(result).__name__}.")
