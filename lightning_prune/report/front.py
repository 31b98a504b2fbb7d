"""The front of a plan over blocks as a picture: what every speed-up costs by each method, and the schedule chosen."""

from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_prune.report.line_styles import line_styles

if TYPE_CHECKING:
    from lightning_prune.planning import BlocksPlan

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
