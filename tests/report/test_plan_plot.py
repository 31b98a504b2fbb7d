from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import matplotlib.colors
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

from lightning_prune import AccuracyBudget, LatencyBudget, LatencyProfile, Schedule, Utility
from lightning_prune.planning import Candidate, Plan
from lightning_prune.profiling import LatencyStats
from lightning_prune.reduction import ToMe
from lightning_prune.report.plan_plot import plot_plan

DEVICE = {"device": "Abacus"}
TIMED = LatencyStats(7.5, 0.1, 0.75, 0.01, 9)


def plan(removed: Sequence[int] = (0, 50, 0, 40), objective: Any = None, **changes: Any) -> Plan:
    """Two methods with three candidates each, of which ToMe's second was timed and is chosen."""
    profile = LatencyProfile((60, 197), (5.0, 10.0), (0.1, 0.1), (9, 9), "random", 0, 4, context=DEVICE)
    schedules = ((0, 0, 0, 0), (0, 50, 0, 40), (90, 0, 0, 0))
    front = [
        Candidate(method, ToMe(), Schedule(schedule), 1.0 - 0.2 * number, 0.1 * number, 1.0 - 0.1 * number)
        for method in ("tome", "topk")
        for number, schedule in enumerate(schedules)
    ]
    front[1] = replace(front[1], timing=TIMED)
    made = Plan(
        Schedule(removed), "tome", ToMe(), objective or Utility(), True, "so", profile, "soft agreement", 0.9, 0.8,
        pruned=TIMED if any(removed) else None, front=tuple(front), label="tome",
    )  # fmt: skip
    return replace(made, **({} if any(removed) else {"accuracy": 1.0, "predicted_ratio": 1.0}), **changes)


def near_dense(candidates: int = 60) -> Plan:
    """A plan whose candidates lie close together near dense, as those of a small model do."""
    front = tuple(
        Candidate("tome", ToMe(), Schedule([0, number, 0, 0]), 1.0 - 0.002 * number, 1e-4 * number, 1 - 1e-4 * number)
        for number in range(candidates)
    )
    chosen = front[candidates // 2]
    return replace(
        plan(chosen.schedule.removed), front=front, accuracy=0.997, predicted_ratio=chosen.ratio, pruned=None
    )


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def markers(axes: Axes, kind: str) -> list[Line2D]:
    return [line for line in axes.lines if line.get_marker() == kind]


def straight(axes: Axes) -> list[tuple[list[float], list[float]]]:
    """The dotted lines, which are budgets."""
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines if line.get_linestyle() == ":"]


def tick_labels(axes: Axes) -> list[Text]:
    """Those inside the limits; those outside are not drawn."""
    found = []
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        found += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    return found


def overlapping(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of texts whose boxes overlap where the figure is drawn."""
    figure.draw_without_rendering()
    texts = [*figure.texts, *figure.legends[0].get_texts()]
    for axes in figure.axes:
        texts += [*axes.texts, *tick_labels(axes), axes.xaxis.label, axes.yaxis.label, axes.title]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text() and text.get_visible()]
    assert len(boxes) > 20
    return [
        (name, other)
        for number, (name, box) in enumerate(boxes)
        for other, another in boxes[:number]
        if box.padded(-1).overlaps(another.padded(-1))
    ]


def test_every_method_has_its_measured_and_its_predicted_figures() -> None:
    figure = plot_plan(plan())
    accuracy, divergence, _ = figure.axes
    assert legend(figure)[:3] == ["tome", "topk", "chosen: tome"]
    (tome, topk) = (line for line in accuracy.lines if line.get_marker() in ("None", None))
    assert list(tome.get_xdata()) == pytest.approx([1, 1 / 0.75, 1 / 0.6])  # the timed one where it was timed
    assert list(topk.get_xdata()) == pytest.approx([1, 1 / 0.8, 1 / 0.6])
    assert list(topk.get_ydata()) == pytest.approx([100, 90, 80])
    assert list(divergence.lines[0].get_xdata()) == pytest.approx([1, 1 / 0.8, 1 / 0.6])
    assert list(divergence.lines[0].get_ydata()) == pytest.approx([0, 0.1, 0.2])
    assert "measured" in accuracy.get_ylabel()
    assert "predicted" in divergence.get_ylabel()


def test_measured_candidates_have_their_95_percent_intervals() -> None:
    made = plan()
    front = tuple(each if each.is_dense else replace(each, accuracy_stderr=0.002) for each in made.front)
    axes = plot_plan(replace(made, front=front)).axes[0]
    drawn = {tuple(lines.get_segments()[0][:, 1].round(4)) for lines in axes.collections}
    assert drawn == {(89.608, 90.392), (79.608, 80.392)}  # 1.96 standard errors to each side
    assert "95% intervals" in axes.get_ylabel()


def test_chosen_candidate_has_a_star_in_both_panels() -> None:
    accuracy, divergence, _ = plot_plan(plan()).axes
    ((measured,), (predicted,)) = markers(accuracy, "*"), markers(divergence, "*")
    assert (measured.get_xdata()[0], measured.get_ydata()[0]) == pytest.approx((1 / 0.75, 90))
    assert (predicted.get_xdata()[0], predicted.get_ydata()[0]) == pytest.approx((1 / 0.8, 0.1))


def test_timed_candidates_are_filled_and_predicted_ones_hollow() -> None:
    figure = plot_plan(plan())
    hollow = [
        matplotlib.colors.to_hex(line.get_markerfacecolor()) == "#ffffff" for line in markers(figure.axes[0], "o")
    ]
    assert hollow == [False, False, True]  # dense, timed, predicted
    assert legend(figure)[-2:] == ["timed against dense", "speed-up predicted from the profile"]


def test_predictions_of_a_simulated_device_are_named() -> None:
    made = plan(pruned=None)
    simulated = replace(made.profile, context={"device": "simulated:", "device_type": "simulated"})
    front = tuple(replace(candidate, timing=None) for candidate in made.front)
    assert legend(plot_plan(replace(made, profile=simulated, front=front)))[-1] == (
        "speed-up predicted on a simulated device"
    )


def test_latency_budget_is_a_line_in_both_panels_of_the_candidates() -> None:
    figure = plot_plan(plan(objective=LatencyBudget(speedup=1.3)))
    assert [lines[0] for axes in figure.axes[:2] for lines in straight(axes)] == [pytest.approx([1.3, 1.3])] * 2
    assert "latency budget, 1.3x" in legend(figure)
    in_ms = plot_plan(plan(objective=LatencyBudget(ms=8)))  # of 10
    assert straight(in_ms.axes[0])[0][0] == pytest.approx([1.25, 1.25])


def test_accuracy_budget_is_a_line_in_the_panel_of_the_proxy_alone() -> None:
    figure = plot_plan(plan(objective=AccuracyBudget(0.05)))
    assert [lines[1] for axes in figure.axes for lines in straight(axes)] == [pytest.approx([95, 95])]
    assert "accuracy budget, at most 5% lost" in legend(figure)


def test_no_objective_has_a_panel() -> None:
    for objective in (Utility(), AccuracyBudget(), LatencyBudget(speedup=1.2)):
        figure = plot_plan(plan(objective=objective))
        assert len(figure.axes) == 3
    assert not straight(plot_plan(plan()).axes[0])


def test_without_predicted_divergence_its_panel_is_left_out() -> None:
    made = plan()
    figure = plot_plan(replace(made, front=tuple(replace(candidate, cost=0.0) for candidate in made.front)))
    assert [axes.get_ylabel().split(",")[0] for axes in figure.axes] == [
        "soft agreement",
        "tokens that\nleave the block",
    ]


def test_schedule_is_drawn_block_by_block() -> None:
    axes = plot_plan(plan()).axes[-1]
    assert [bar.get_height() for bar in axes.patches] == [197, 147, 147, 107]
    assert [text.get_text() for text in axes.texts] == ["-50", "-40"]
    assert "tome" in axes.get_xlabel()


def test_plan_that_removes_nothing_has_chosen_dense() -> None:
    figure = plot_plan(plan(removed=(0, 0, 0, 0)))
    assert "nothing is removed" in figure.axes[-1].get_xlabel()
    assert "chosen: dense" in legend(figure)
    (star,) = markers(figure.axes[0], "*")
    assert (star.get_xdata()[0], star.get_ydata()[0]) == (1, 100)


def test_of_many_candidates_the_chosen_one_and_its_neighbours_are_labelled() -> None:
    made = near_dense()
    labels = {text.get_text() for text in plot_plan(made).axes[0].texts}
    number = len(made.front) // 2
    assert labels == {
        f"{1 / (1 - 0.002 * each):.2f}x, {percent:.1f}%"
        for each, percent in ((number - 1, 99.7), (number, 99.7), (number + 1, 99.7))
    }


@pytest.mark.parametrize(
    "made", [plan(), plan(removed=(0, 0, 0, 0)), near_dense(), plan(objective=LatencyBudget(speedup=1.3))]
)
def test_no_text_overlaps_another(made: Plan) -> None:
    assert overlapping(plot_plan(made)) == []


def test_no_text_overlaps_another_in_a_deep_schedule() -> None:
    profile = replace(plan().profile, depth=40)
    removed = [0] + [4] * 39
    candidate = Candidate("tome", ToMe(), Schedule(removed), 0.6, 0.1, 0.9)
    assert overlapping(plot_plan(replace(plan(removed), profile=profile, front=(candidate,)))) == []


def test_overlap_is_seen() -> None:
    """The check itself: two labels at one place."""
    figure = plot_plan(plan())
    for text in ("first", "second"):
        figure.axes[0].annotate(text, (1.3, 85))
    assert ("second", "first") in overlapping(figure)
