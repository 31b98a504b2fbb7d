"""The plot of a plan: accuracy and predicted divergence of the candidates against speed-up, and the chosen schedule."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from lightning_prune._utils.formatting import context_line, model_title, percent, speedup
from lightning_prune.planning.candidates import Candidate
from lightning_prune.planning.objectives import AccuracyBudget, LatencyBudget
from lightning_prune.planning.results import Plan
from lightning_prune.report.styles import INK, PointLabel, line_styles, place_labels

_BLUE, _RED, _GREY = "#1f5fa8", "#c0392b", "#7f8c8d"
_MANY_BLOCKS = 16  # beyond which figures above the bars are written upright, as they are wider than the bars
_Styles = dict[str, tuple[str, str, bool]]


def plot_plan(plan: Plan) -> Figure:
    """Draws the measured proxy and the predicted KL divergence against speed-up, and the tokens that leave each block.

    A budget is a line: of a speed-up in both panels of the candidates, of accuracy in the panel of the proxy. A filled
    marker is a candidate that was timed against dense; a hollow one has a predicted speed-up. Vertical lines are 95%
    intervals over images like those of the calibration. The chosen candidate and its two neighbours are labelled.

    Args:
        plan: The plan. The panel of the divergence is left out where none was predicted.
    """
    predicted = any(candidate.cost for candidate in plan.front)
    figure = Figure(figsize=(7.5, 9.2 if predicted else 6.8), layout="constrained")
    heights = [1.5, 1.1, 1.0] if predicted else [1.5, 1.0]
    panels = list(figure.subplots(len(heights), 1, height_ratios=heights))
    styles = line_styles(list(dict.fromkeys(candidate.method for candidate in plan.front)))
    _draw_accuracy(panels[0], plan, styles)
    if predicted:
        panels[0].sharex(panels[1])
        _draw_divergence(panels[1], plan, styles)
    _draw_budget(panels[:-1], plan)
    panels[-2].set_xlabel("speed-up over dense")
    _draw_schedule(panels[-1], plan)
    figure.legend(handles=_legend(plan, styles), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    context = plan.profile.context
    figure.suptitle(f"{model_title(context)}: {plan.objective}\n{context_line(context)}", fontsize=10)
    place_labels(panels[0], _labels(plan, styles))
    return figure


def _measured(plan: Plan, method: str) -> list[Candidate]:
    """The candidates of a method whose proxy was measured, in the order of their speed-up."""
    known = [each for each in plan.front if each.method == method and each.accuracy is not None]
    return sorted(known, key=lambda candidate: -candidate.latency_ratio)


def _at(candidate: Candidate) -> tuple[float, float]:
    """The place of a candidate among the measured ones: its speed-up, and its proxy in percent."""
    return 1 / candidate.latency_ratio, 100 * (candidate.accuracy or 0.0)


def _draw_accuracy(axes: Axes, plan: Plan, styles: _Styles) -> None:
    for method, (color, marker, _) in styles.items():
        candidates = _measured(plan, method)
        places = [_at(candidate) for candidate in candidates]
        axes.plot([x for x, _ in places], [y for _, y in places], color=color, linewidth=1.0, alpha=0.6)
        for candidate, place in zip(candidates, places, strict=True):
            filled = candidate.is_dense or candidate.timing is not None
            axes.plot(*place, marker, color=color, markersize=5, markerfacecolor=color if filled else "white")
            if candidate.estimate.interval is not None:
                low, high = candidate.estimate.interval
                axes.vlines(place[0], 100 * low, 100 * high, color=color, linewidth=1.0, alpha=0.5)
    axes.plot(plan.speedup, 100 * plan.accuracy, "*", color=INK, markersize=14, fillstyle="none", zorder=5)
    known = any(each.estimate.interval is not None and not each.is_dense for each in plan.front)
    axes.set_ylabel(f"{plan.proxy or 'proxy'}, measured\n[% of dense{', 95% intervals' if known else ''}]")
    axes.margins(0.08, 0.15)
    axes.grid(alpha=0.25)


def _draw_divergence(axes: Axes, plan: Plan, styles: _Styles) -> None:
    for method, (color, _, _) in styles.items():
        candidates = sorted((each for each in plan.front if each.method == method), key=lambda each: -each.ratio)
        axes.plot([1 / each.ratio for each in candidates], [each.cost for each in candidates], color=color)
    chosen = _chosen(plan)
    if chosen is not None:
        axes.plot(1 / chosen.ratio, chosen.cost, "*", color=INK, markersize=14, fillstyle="none", zorder=5)
    axes.set_ylabel("KL divergence from dense,\npredicted [nats]")
    axes.margins(0.08)
    axes.set_ylim(bottom=-0.04 * axes.get_ylim()[1])
    axes.grid(alpha=0.25)


def _draw_budget(panels: Sequence[Axes], plan: Plan) -> None:
    """Draws the budget, if the objective is one, as a line in each panel whose axis it limits."""
    style: dict[str, Any] = {"color": _RED, "linewidth": 1.1, "linestyle": ":"}
    if isinstance(plan.objective, LatencyBudget):
        for axes in panels:
            axes.axvline(plan.dense_ms / plan.objective.limit_ms(plan.dense_ms), **style)
    if isinstance(plan.objective, AccuracyBudget):
        panels[0].axhline(100 * (1 - plan.objective.max_drop), **style)


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
            textcoords="offset points",
            xytext=(0, 2),
            ha="center",
            va="bottom",
            rotation=90 if depth > _MANY_BLOCKS else 0,
            fontsize=8,
            color=_BLUE,
        )
    axes.axhline(n, color="black", linewidth=0.8, linestyle="--")
    axes.set_xlim(-0.6, depth - 0.4)
    axes.set_ylim(0, 1.25 * n)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=_MANY_BLOCKS, integer=True))
    how = plan.schedule.method_label or plan.method
    axes.set_xlabel(f"block ({how})" if plan.schedule.total_removed else "block (nothing is removed)")
    axes.set_ylabel("tokens that\nleave the block")


def _chosen(plan: Plan) -> Candidate | None:
    """The candidate of the front that the plan deploys."""
    if not plan.schedule.total_removed:
        return next((candidate for candidate in plan.front if candidate.is_dense), None)
    if plan.reduction is None:  # two schedules of several methods may remove as many tokens in the same blocks
        return next((candidate for candidate in plan.front if candidate.schedule == plan.schedule), None)
    key = (plan.label or plan.method, plan.schedule.removed)
    return next((candidate for candidate in plan.front if candidate.key == key), None)


def _labels(plan: Plan, styles: _Styles) -> list[PointLabel]:
    """The chosen candidate, then the next slower and the next faster one of its method."""
    chosen = _chosen(plan)
    text = f"{speedup(plan.speedup)}, {percent(plan.accuracy, 1)}"
    labels = [PointLabel(text, plan.speedup, 100 * plan.accuracy, INK)]
    if chosen is None:
        return labels
    others = [each for each in _measured(plan, chosen.method) if each.key != chosen.key]
    slower = [each for each in others if each.latency_ratio > 1 / plan.speedup][-1:]
    faster = [each for each in others if each.latency_ratio <= 1 / plan.speedup][:1]
    color = styles[chosen.method][0]
    for candidate in slower + faster:
        text = f"{speedup(1 / candidate.latency_ratio)}, {percent(candidate.accuracy, 1)}"
        labels.append(PointLabel(text, *_at(candidate), color))
    return labels


def _legend(plan: Plan, styles: _Styles) -> list[Line2D]:
    """The methods, the chosen candidate, the budget, and what filled and hollow markers mean."""
    handles = [Line2D([], [], color=color, marker=marker, label=name) for name, (color, marker, _) in styles.items()]
    chosen = plan.method if plan.schedule.total_removed else "dense"
    star: dict[str, Any] = {"color": INK, "marker": "*", "markersize": 11, "fillstyle": "none", "linestyle": "none"}
    handles.append(Line2D([], [], label=f"chosen: {chosen}", **star))
    if isinstance(plan.objective, AccuracyBudget | LatencyBudget):
        handles.append(Line2D([], [], color=_RED, linestyle=":", label=f"{plan.objective}"))
    where = "on a simulated device" if plan.profile.context.get("device_type") == "simulated" else "from the profile"
    shown = [each for each in plan.front if each.accuracy is not None and not each.is_dense]
    for name, face, occurs in (
        ("timed against dense", _GREY, any(each.timing is not None for each in shown)),
        (f"speed-up predicted {where}", "white", any(each.timing is None for each in shown)),
    ):
        if occurs:
            handles.append(Line2D([], [], color=_GREY, marker="o", linestyle="none", markerfacecolor=face, label=name))
    return handles
