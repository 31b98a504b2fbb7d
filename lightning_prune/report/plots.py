"""Plots of latency profiles and plans, and `plot`, which draws everything that has a plot."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_prune._utils.formatting import context_line, percent
from lightning_prune.errors import ArgumentError
from lightning_prune.planning.results import Plan
from lightning_prune.profiling.latency_profile import LatencyProfile
from lightning_prune.report.pareto import plot_pareto
from lightning_prune.report.styles import line_styles, save_figure

_BLUE, _RED, _GREY = "#1f5fa8", "#c0392b", "#7f8c8d"  # readable in print and with red-green blindness
_ORANGE = "#d35400"


def plot_profile(profile: LatencyProfile, eager: LatencyProfile | None = None) -> Figure:
    """Draws latency against tokens with its spread, cliffs, plateaus, and the straight line from end to end.

    Args:
        profile: The profile.
        eager: The profile of the same model without `torch.compile`, drawn in the same axes.
    """
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    _draw_latency(axes, profile)
    if eager is not None:
        tokens, latency = np.array(eager.tokens), np.array(eager.milliseconds)
        spread = np.array(eager.spread)
        axes.fill_between(tokens, latency - spread, latency + spread, color=_ORANGE, alpha=0.18, linewidth=0)
        axes.plot(tokens, latency, color=_ORANGE, marker=".", linewidth=1.4, label="measured, eager")
        axes.set_ylim(bottom=0, top=1.05 * max(*(latency + spread), axes.get_ylim()[1] / 1.05))
        axes.legend(fontsize=7, loc="lower right", ncols=2)
    figure.suptitle(_title(profile), fontsize=10)
    return figure


def _draw_latency(axes: Axes, profile: LatencyProfile) -> None:
    tokens, latency = np.array(profile.tokens), np.array(profile.milliseconds)
    spread = np.array(profile.spread)
    axes.fill_between(tokens, latency - spread, latency + spread, color=_BLUE, alpha=0.18, linewidth=0, label="spread")
    axes.plot(tokens, latency, color=_BLUE, marker=".", linewidth=1.4, label=_measured(profile))
    if len(tokens) > 1:
        line = latency[[0, -1]]
        axes.plot(tokens[[0, -1]], line, color=_GREY, linewidth=0.8, linestyle="--", label="if it were a straight line")
    for number, cliff in enumerate(profile.cliffs()):
        label = "cliff" if number == 0 else None
        axes.axvspan(cliff.below, cliff.above, color=_RED, alpha=0.25, linewidth=0, label=label)
    for number, flat in enumerate(profile.plateaus()):
        label = "plateau" if number == 0 else None
        axes.axvspan(flat.below, flat.above, color=_GREY, alpha=0.15, linewidth=0, label=label)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens that leave the reducing block")
    axes.set_ylabel("latency of a batch [ms]")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, loc="lower right", ncols=2)


def _measured(profile: LatencyProfile) -> str:
    return "measured, compiled" if profile.context.get("compiled") else "measured"


def _title(profile: LatencyProfile) -> str:
    context = profile.context
    what = "random drop before block 0" if profile.protocol == "paper" else f"{profile.method} at block {profile.block}"
    return f"{context.get('model', 'model')}, {what}\n{context_line(context)}"


def plot_front(plan: Plan) -> Figure:
    """Draws the Pareto front of each method (KL divergence against speed-up) and the tokens that leave each block."""
    figure = Figure(figsize=(7.5, 6.4), layout="constrained")
    front, schedule = figure.subplots(2, 1, height_ratios=[1.5, 1])
    _draw_front(front, plan)
    _draw_schedule(schedule, plan)
    context = plan.profile.context
    figure.suptitle(f"{context.get('model', 'model')}, {plan.objective}\n{context_line(context)}", fontsize=10)
    return figure


def _draw_front(axes: Axes, plan: Plan) -> None:
    styles = line_styles(list(dict.fromkeys(entry.method for entry in plan.front)))
    for method, (color, marker, _) in styles.items():
        entries = [entry for entry in plan.front if entry.method == method]
        axes.plot([1 / e.ratio for e in entries], [e.cost for e in entries], color=color, label=method)
        for entry in entries:
            if entry.accuracy is not None and entry.schedule.total_removed:
                at = 1 / entry.ratio, entry.cost
                axes.plot(*at, marker, color=color, markersize=5)
                axes.annotate(
                    percent(entry.accuracy, 1), at, textcoords="offset points", xytext=(4, -9), fontsize=7, color=color
                )
    chosen = [
        e for e in plan.front if e.method == (plan.label or plan.method) and e.schedule.removed == plan.schedule.removed
    ]
    if chosen and plan.schedule.total_removed:
        at = 1 / chosen[0].ratio, chosen[0].cost
        axes.plot(*at, "*", color="black", markersize=13, fillstyle="none", label="chosen")
    axes.set_xlabel("speed-up, predicted")
    axes.set_ylabel(f"KL divergence from dense [nats]\n(dots: measured {plan.proxy})")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)


def _draw_schedule(axes: Axes, plan: Plan) -> None:
    n, depth = plan.profile.dense_tokens, plan.schedule.depth
    leaving = plan.schedule.tokens(n)
    reducing = set(plan.schedule.reducing)
    colors = [_BLUE if block in reducing else _GREY for block in range(depth)]
    axes.bar(range(depth), leaving, color=colors, width=0.85)
    for block in reducing:
        axes.annotate(
            f"-{plan.schedule.removed[block]}",
            (block, leaving[block]),
            ha="center",
            va="bottom",
            fontsize=8,
            color=_BLUE,
        )
    axes.axhline(n, color="black", linewidth=0.8, linestyle="--")
    axes.set_ylim(0, 1.15 * n)
    axes.set_xticks(range(depth))
    axes.set_xlabel(f"block ({plan.method})" if plan.schedule.total_removed else "block (nothing is removed)")
    axes.set_ylabel("tokens that leave the block")


class _HasDocument(Protocol):
    """The result of a comparison, which writes itself as the document `results.json`."""

    def to_dict(self) -> dict[str, Any]: ...


def plot(
    result: LatencyProfile | Plan | _HasDocument | Mapping[str, Any],
    path: str | Path | None = None,
    *,
    eager: LatencyProfile | None = None,
) -> Figure:
    """Draws a latency profile, a plan, or a comparison.

    Args:
        result: A profile: latency against tokens. A plan: the Pareto front of each method and the chosen schedule. A
            comparison, or the document that it writes as `results.json`: accuracy against latency.
        path: File to write, in the format of its suffix; it appears whole or not at all. None: only the figure.
        eager: With a profile of a compiled model: the profile of the same model without compilation, drawn in the same
            axes.

    Returns:
        The figure.

    Raises:
        ArgumentError: If `result` is none of these, or `eager` is given with anything but a profile.
        DataError: If the document of a comparison has no rows.

    Example:
        >>> from lightning_prune.profiling import LatencyProfile
        >>> profile = LatencyProfile((60, 197), (5.0, 10.0), (0.1, 0.1), (9, 9), "random", 0, 12)
        >>> plot(profile).axes[0].get_ylabel()
        'latency of a batch [ms]'
    """
    if eager is not None and not isinstance(result, LatencyProfile):
        raise ArgumentError(f"`eager` must come with a LatencyProfile, got {type(result).__name__}.")
    figure = _draw(result, eager)
    if path is not None:
        save_figure(figure, path)
    return figure


def _draw(result: Any, eager: LatencyProfile | None) -> Figure:
    if isinstance(result, LatencyProfile):
        return plot_profile(result, eager)
    if isinstance(result, Plan):
        return plot_front(result)
    if isinstance(result, Mapping):
        return plot_pareto(result)
    if hasattr(result, "to_dict"):
        return plot_pareto(result.to_dict())
    raise ArgumentError(f"`result` must be a LatencyProfile, a Plan or a comparison, got {type(result).__name__}.")
