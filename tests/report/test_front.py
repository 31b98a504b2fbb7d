import pytest

from lightning_prune import LatencyProfile, Schedule, Utility
from lightning_prune.planning import Candidate, Plan
from lightning_prune.reduction import ToMe
from lightning_prune.report.plots import plot, plot_front


def plan(removed=(0, 50, 0, 40)):
    profile = LatencyProfile((60, 197), (5.0, 10.0), (0.1, 0.1), (9, 9), "random", 0, 4, context={"device": "Abacus"})
    schedules = ((0, 0, 0, 0), (0, 50, 0, 40), (90, 0, 0, 0))
    front = tuple(
        Candidate(method, ToMe(), Schedule(schedule), 1.0 - 0.2 * number, 0.1 * number, 0.9 if number else 1.0)
        for method in ("tome", "topk")
        for number, schedule in enumerate(schedules)
    )
    return Plan(
        Schedule(removed), "tome", ToMe(), Utility(), True, "so", profile, "soft agreement", 0.9, 0.8,
        front=front, label="tome",
    )  # fmt: skip


def test_every_method_has_a_line_and_the_chosen_point_is_marked():
    figure = plot_front(plan())
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["tome", "topk", "chosen"]
    (star,) = [line for line in figure.axes[0].lines if line.get_marker() == "*"]
    assert (star.get_xdata()[0], star.get_ydata()[0]) == pytest.approx((10 / 8, 0.1))


def test_the_schedule_is_drawn_block_by_block():
    axes = plot_front(plan()).axes[1]
    assert [bar.get_height() for bar in axes.patches] == [197, 147, 147, 107]
    assert [text.get_text() for text in axes.texts] == ["-50", "-40"]
    assert "tome" in axes.get_xlabel()


def test_a_plan_that_removes_nothing():
    figure = plot_front(plan(removed=(0, 0, 0, 0)))
    assert "nothing is removed" in figure.axes[1].get_xlabel()
    assert "chosen" not in [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_it_is_what_plot_saves(tmp_path):
    figure = plot(plan(), tmp_path / "plan.png")
    assert figure.axes[0].get_xlabel() == "speed-up, predicted"
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
