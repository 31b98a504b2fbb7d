"""The plot of a latency profile, and `plot`, which draws everything that has a plot."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_prune._utils.formatting import context_line
from lightning_prune._utils.validation import check, check_path
from lightning_prune.errors import ArgumentError
from lightning_prune.planning.latency_model import removes_before_blocks
from lightning_prune.planning.results import Plan
from lightning_prune.profiling.latency_profile import LatencyProfile
from lightning_prune.report.pareto import plot_pareto
from lightning_prune.report.plan_plot import plot_plan
from lightning_prune.report.styles import save_figure

_BLUE, _RED, _GREY = "#1f5fa8", "#c0392b", "#7f8c8d"  # readable in print and with red-green blindness
_ORANGE = "#d35400"


def plot_profile(profile: LatencyProfile, eager: LatencyProfile | None = None) -> Figure:
    """Draws latency against tokens between its quartiles, the cliffs and the plateaus.

    Args:
        profile: The profile.
        eager: The profile of the same model without `torch.compile`, drawn in the same axes.
    """
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    simulated = profile.context.get("device_type") == "simulated"
    source = "simulated" if simulated else "measured"
    if eager is None:
        _draw_curve(axes, profile, _BLUE, source)
    else:
        _draw_curve(axes, profile, _BLUE, f"{source}, compiled")
        _draw_curve(axes, eager, _ORANGE, f"{source}, eager")
    if len(profile.tokens) > 1:
        ends = [profile.tokens[0], profile.tokens[-1]], [profile.milliseconds[0], profile.milliseconds[-1]]
        axes.plot(*ends, color=_GREY, linewidth=0.8, linestyle="--", label="straight line between the ends")
    for number, cliff in enumerate(profile.cliffs()):
        label = "cliff" if number == 0 else None
        axes.axvspan(cliff.below, cliff.above, color=_RED, alpha=0.25, linewidth=0, label=label)
    for number, flat in enumerate(profile.plateaus()):
        label = "plateau" if number == 0 else None
        axes.axvspan(flat.below, flat.above, color=_GREY, alpha=0.15, linewidth=0, label=label)
    axes.set_ylim(bottom=0)
    everywhere = removes_before_blocks(profile)
    axes.set_xlabel("tokens in every block" if everywhere else "tokens that leave the last reducing block")
    axes.set_ylabel(f"latency of a batch [ms], {source}")
    axes.grid(alpha=0.25)
    figure.legend(fontsize=8, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(_title(profile), fontsize=10)
    return figure


def _draw_curve(axes: Axes, profile: LatencyProfile, color: str, label: str) -> None:
    tokens, latency = np.array(profile.tokens), np.array(profile.milliseconds)
    axes.plot(tokens, latency, color=color, marker=".", linewidth=1.4, label=label)
    low, high = np.array(profile.low_ms), np.array(profile.high_ms)
    if (high > low).any():  # neither of profiles without quartiles, nor of single rounds
        axes.fill_between(tokens, low, high, color=color, alpha=0.18, linewidth=0, label=f"quartiles, {label}")


def _title(profile: LatencyProfile) -> str:
    context = profile.context
    if removes_before_blocks(profile):
        what = "latency against token count (random tokens dropped before block 0)"
    else:
        what = f"latency with {profile.method} from block {profile.block}"
    return f"{context.get('model', 'model')}: {what}\n{context_line(context)}"


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
        result: A profile: latency against tokens. A plan: accuracy against speed-up of the candidates of each method,
            and the chosen schedule. A comparison, or the document that it writes as `results.json`: accuracy against
            latency.
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
        'latency of a batch [ms], measured'
    """
    if eager is not None and not isinstance(result, LatencyProfile):
        raise ArgumentError(f"`eager` must come with a LatencyProfile, got {type(result).__name__}.")
    valid = eager is None or isinstance(eager, LatencyProfile)
    check("eager", eager, "a LatencyProfile or None", valid)
    if path is not None:
        check_path("path", path)
    figure = _draw(result, eager)
    if path is not None:
        save_figure(figure, path)
    return figure


def _draw(result: Any, eager: LatencyProfile | None) -> Figure:
    if isinstance(result, LatencyProfile):
        return plot_profile(result, eager)
    if isinstance(result, Plan):
        return plot_plan(result)
    if isinstance(result, Mapping):
        return plot_pareto(result)
    if hasattr(result, "to_dict"):
        return plot_pareto(result.to_dict())
    raise ArgumentError(f"`result` must be a LatencyProfile, a Plan or a comparison, got {type(result).__name__}.")
