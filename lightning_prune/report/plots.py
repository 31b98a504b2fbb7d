"""Plots of latency profiles, plans and Pareto fronts."""

from collections.abc import Sequence
from math import log
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from lightning_prune._utils.files import atomic_write

if TYPE_CHECKING:
    from lightning_prune.planning import BlocksPlan, Plan
    from lightning_prune.profiling import LatencyProfile


# Okabe and Ito's colours, which colour-blind readers tell apart, and markers for those who print in grey.
_STYLES = (
    ("#0072b2", "o"),
    ("#d55e00", "s"),
    ("#009e73", "^"),
    ("#cc79a7", "D"),
    ("#e69f00", "v"),
    ("#56b4e9", "P"),
    ("#6c3483", "X"),
    ("#8a7500", "<"),
    ("#7b3f00", ">"),
    ("#00798c", "h"),
)
_FLOOR = ("#6b7280", ".")  # of `random`, which is there to be beaten


def line_styles(names: Sequence[str]) -> dict[str, tuple[str, str, bool]]:
    """Line -> colour, marker, whether it is drawn hollow; a method's int8 variant looks like the method, hollow.

    Args:
        names: The lines as `series_name` names them, in the order of the legend.

    Example:
        >>> line_styles(["pomt", "random", "pomt+int8"])["pomt+int8"]
        ('#0072b2', 'o', True)
    """
    bases = list(dict.fromkeys(name.removesuffix("+int8") for name in names))
    others = [base for base in bases if base != "random"]
    chosen = {base: _style(number) for number, base in enumerate(others)} | {"random": _FLOOR}
    return {name: (*chosen[name.removesuffix("+int8")], name.endswith("int8")) for name in names}


def _style(number: int) -> tuple[str, str]:
    """Past the tenth the colours return with other markers."""
    around, place = divmod(number, len(_STYLES))
    return _STYLES[place][0], _STYLES[(place + around) % len(_STYLES)][1]


_SPEEDUPS = (0.5, 0.67, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0, 10.0, 20.0, 50.0)


def add_speedups(axes: Axes, dense_ms: float) -> None:
    """Adds the scale; latency is linear below, so the speed-ups stand at uneven distances.

    Args:
        axes: Latency in milliseconds, its limits settled.
        dense_ms: The latency that speed-ups are relative to.
    """
    low, high = sorted(axes.get_xlim())
    ticks = [ratio for ratio in _SPEEDUPS if low <= dense_ms / ratio <= high]
    apart = 0.05 * (high - low)
    above = axes.secondary_xaxis("top")  # in milliseconds too: a reciprocal scale breaks where it passes zero
    kept: list[float] = []
    for ratio in sorted(ticks, key=lambda ratio: abs(log(ratio))):  # 1x first: no two labels closer than their width
        if all(abs(dense_ms / other - dense_ms / ratio) > apart for other in kept):
            kept.append(ratio)
    above.xaxis.set_major_locator(FixedLocator([dense_ms / ratio for ratio in kept]))
    above.xaxis.set_minor_locator(NullLocator())
    above.xaxis.set_major_formatter(FuncFormatter(lambda place, _: f"{dense_ms / place:.3g}x"))
    above.set_xlabel("speed-up over dense")
    axes.set_xlim(low, high)


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
    with atomic_write(path) as temporary:
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


_BLUE, _GREY = "#1f5fa8", "#7f8c8d"


def plot_front(plan: "BlocksPlan") -> Figure:
    """Two panels: KL divergence against speed-up, and the proxy where it was measured; tokens that leave each block."""
    figure = Figure(figsize=(7.5, 6.4), layout="constrained")
    front, schedule = figure.subplots(2, 1, height_ratios=[1.5, 1])
    _draw_front(front, plan)
    _draw_schedule(schedule, plan)
    context = plan.profile.context
    where = f"{context.get('device', '?')}, batch {context.get('batch_size', '?')}, {context.get('precision', '?')}"
    figure.suptitle(f"{context.get('model', 'model')}, {plan.objective}\n{where}", fontsize=10)
    return figure


def _draw_front(axes: Axes, plan: "BlocksPlan") -> None:
    dense_ms = plan.profile.dense_ms
    styles = line_styles(list(dict.fromkeys(entry.method for entry in plan.front)))
    for method, (color, marker, _) in styles.items():
        entries = [entry for entry in plan.front if entry.method == method]
        axes.plot([dense_ms / e.milliseconds for e in entries], [e.cost for e in entries], color=color, label=method)
        for entry in entries:
            if entry.accuracy is not None and entry.schedule.total:
                at = dense_ms / entry.milliseconds, entry.cost
                axes.plot(*at, marker, color=color, markersize=5)
                told = f"{100 * entry.accuracy:.1f}%"
                axes.annotate(told, at, textcoords="offset points", xytext=(4, -9), fontsize=7, color=color)
    chosen = [
        e for e in plan.front if e.method == (plan.label or plan.method) and e.schedule.removed == plan.schedule.removed
    ]
    if chosen and plan.schedule.total:
        at = dense_ms / chosen[0].milliseconds, chosen[0].cost
        axes.plot(*at, "*", color="black", markersize=13, fillstyle="none", label="chosen")
    axes.set_xlabel("speed-up, predicted")
    axes.set_ylabel(f"KL divergence from dense [nats]\n(dots: measured {plan.proxy})")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)


def _draw_schedule(axes: Axes, plan: "BlocksPlan") -> None:
    n, depth = plan.profile.dense_tokens, plan.schedule.depth
    leaving = plan.schedule.tokens(n)
    reducing = set(plan.schedule.reducing)
    colors = [_BLUE if block in reducing else _GREY for block in range(depth)]
    axes.bar(range(depth), leaving, color=colors, width=0.85)
    for block in reducing:
        told = f"-{plan.schedule.removed[block]}"
        axes.annotate(told, (block, leaving[block]), ha="center", va="bottom", fontsize=8, color=_BLUE)
    axes.axhline(n, color="black", linewidth=0.8, linestyle="--")
    axes.set_ylim(0, 1.15 * n)
    axes.set_xticks(range(depth))
    axes.set_xlabel(f"block ({plan.method})" if plan.schedule.total else "block (nothing is removed)")
    axes.set_ylabel("tokens that leave it")
