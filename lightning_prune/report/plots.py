"""Plots of profiles and plans: latency, accuracy proxy and objective against tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_prune.files import replacing

if TYPE_CHECKING:
    from lightning_prune.planning import Plan
    from lightning_prune.profiling import LatencyProfile

_BLUE, _RED, _GREY = "#1f5fa8", "#c0392b", "#7f8c8d"  # readable in print and with red-green blindness
_PLAN_STYLES = (("#d35400", "o"), ("#16803c", "s"), ("#6c3483", "^"), ("#00798c", "D"))


def plot_profile(profile: "LatencyProfile", eager: "LatencyProfile | None" = None) -> Figure:
    """Latency against tokens with spread, cliffs, plateaus, and the straight line that hardware does not follow.

    Args:
        profile: The curve.
        eager: The same model without `torch.compile`, drawn beside it.
    """
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    _draw_latency(axes, profile)
    if eager is not None:
        tokens, latency = np.array(eager.tokens), np.array(eager.milliseconds)
        spread = np.array(eager.spread)
        color = _PLAN_STYLES[0][0]
        axes.fill_between(tokens, latency - spread, latency + spread, color=color, alpha=0.18, linewidth=0)
        axes.plot(tokens, latency, color=color, marker=".", linewidth=1.4, label="measured, eager")
        axes.set_ylim(bottom=0, top=1.05 * max(*(latency + spread), axes.get_ylim()[1] / 1.05))
        axes.legend(fontsize=7, loc="lower right", ncols=2)
    figure.suptitle(_title(profile), fontsize=10)
    return figure


def plot_plans(plans: "Sequence[Plan]") -> Figure:
    """Three panels over tokens: latency, accuracy proxy, objective; the chosen point of each plan is marked.

    Args:
        plans: One or more plans made on the same profile.
    """
    profile = plans[0].profile
    figure = Figure(figsize=(7.5, 9.0), layout="constrained")
    latency, proxy, score = figure.subplots(3, 1, sharex=True, gridspec_kw={"height_ratios": [1.3, 1, 1]})
    _draw_latency(latency, profile)
    latency.set_xlabel("")
    known = {count: value for plan in plans for count, value in plan.accuracy.items()}
    counts = sorted(known)
    proxy.plot(counts, [100 * known[count] for count in counts], color=_BLUE, marker=".", linewidth=1)
    proxy.set_ylabel(f"{plans[0].proxy}\n[% of dense]")
    proxy.grid(alpha=0.25)
    score.set_xlabel("tokens that leave the reducing block")
    score.set_ylabel("objective\n[higher is better]")
    score.grid(alpha=0.25)
    for plan, (color, marker) in zip(plans, _PLAN_STYLES * len(plans), strict=False):
        points = {count: value for count, value in plan.scores().items() if np.isfinite(value)}
        score.plot(list(points), list(points.values()), color=color, marker=".", linewidth=1, label=str(plan.objective))
        places = ((latency, profile.at(plan.tokens)), (proxy, 100 * known[plan.tokens]), (score, points[plan.tokens]))
        for axes, height in places:
            label = f"chosen: {plan.tokens} tokens ({plan.objective})" if axes is latency else None
            axes.plot(plan.tokens, height, marker, color=color, markersize=9, fillstyle="none", mew=2, label=label)
    latency.legend(fontsize=7, loc="lower right", ncols=2)
    score.legend(fontsize=8, loc="best")
    figure.suptitle(_title(profile), fontsize=10)
    return figure


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Writes the figure in the format of the suffix; the file appears whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
    return Path(path)


def _draw_latency(axes: Axes, profile: "LatencyProfile") -> None:
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


def _measured(profile: "LatencyProfile") -> str:
    return "measured, compiled" if profile.context.get("compiled") else "measured"


def _title(profile: "LatencyProfile") -> str:
    context = profile.context
    what = "random drop before block 0" if profile.protocol == "paper" else f"{profile.method} at block {profile.block}"
    where = f"{context.get('device', '?')}, batch {context.get('batch_size', '?')}, {context.get('precision', '?')}"
    return f"{context.get('model', 'model')}, {what}\n{where}"
