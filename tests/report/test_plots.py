import math
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import lightning_prune as lp
from lightning_prune.errors import ArgumentError
from lightning_prune.report import plots
from lightning_prune.report.plots import plot_plans, plot_profile
from lightning_prune.report.styles import save_figure

from .made_up import comparison

CONTEXT = {"model": "VisionTransformer", "device": "Abacus", "batch_size": 4, "precision": "float32"}
# Milliseconds at token counts: a cliff between 100 and 120, a plateau from 197 down to 120.
CURVE = {40: 30.0, 70: 40.0, 100: 50.0, 120: 90.0, 150: 90.5, 180: 91.0, 197: 91.5}


def profile(**changes: Any) -> lp.LatencyProfile:
    columns = {"milliseconds": tuple(CURVE.values()), "spread": (1.0,) * len(CURVE), "rounds": (49,) * len(CURVE)}
    facts = {"method": "pomt", "block": 3, "depth": 12, "context": CONTEXT}
    return lp.LatencyProfile(tokens=tuple(CURVE), **{**columns, **facts, **changes})


def plan(tokens: int, objective: Any) -> lp.Plan:
    return lp.Plan(
        schedule=lp.Schedule.single(12, 3, 197 - tokens),
        method="pomt",
        block=3,
        objective=objective,
        profile=profile(),
        proxy="soft agreement",
        accuracy={40: 0.6, 100: 0.97, 180: 0.999, 197: 1.0},
        tokens=tokens,
        reason="Because.",
    )


def labels(axes: Axes) -> list[str]:
    legend = axes.get_legend()
    return [text.get_text() for text in legend.get_texts()] if legend else []


def marks(axes: Axes, at: float) -> list[float]:
    """Heights of the single hollow markers at a token count."""
    return [line.get_ydata()[0] for line in axes.lines if len(line.get_xdata()) == 1 and line.get_xdata()[0] == at]


def spans(axes: Axes, color: str) -> list[tuple[float, float]]:
    from matplotlib.colors import to_rgb

    found = [patch for patch in axes.patches if to_rgb(patch.get_facecolor()[:3]) == to_rgb(color)]
    boxes = [patch.get_extents().transformed(axes.transData.inverted()) for patch in found]
    return [(round(box.x0), round(box.x1)) for box in boxes]


def test_profile_shows_curve_spread_cliff_and_plateau() -> None:
    (axes,) = plot_profile(profile()).axes
    curve = next(line for line in axes.lines if line.get_label() == "measured")
    assert dict(zip(curve.get_xdata().tolist(), curve.get_ydata().tolist(), strict=True)) == CURVE
    assert labels(axes) == ["spread", "measured", "if it were a straight line", "cliff", "plateau"]
    assert spans(axes, plots._RED) == [(100, 120)]
    assert spans(axes, plots._GREY) == [(120, 197)]
    assert axes.get_xlabel() == "tokens that leave the reducing block"
    assert axes.get_ylabel() == "latency of a batch [ms]"
    assert axes.get_ylim()[0] == 0


def test_profile_says_what_was_measured_and_where() -> None:
    assert plot_profile(profile()).get_suptitle() == "VisionTransformer, pomt at block 3\nAbacus, batch 4, float32"
    paper = plot_profile(profile(protocol="paper", context={}))
    assert paper.get_suptitle() == "model, random drop before block 0\n"


def test_a_single_point_can_be_drawn() -> None:
    short = lp.LatencyProfile((197,), (1.0,), (0.1,), (3,), "pomt", 3, 12, context=CONTEXT)
    (axes,) = plot_profile(short).axes
    assert labels(axes) == ["spread", "measured"]


def test_plans_mark_the_chosen_points_in_all_three_panels() -> None:
    utility, budget = plan(40, lp.Utility(0.5)), plan(100, lp.AccuracyBudget(0.05))
    figure = plot_plans([utility, budget])
    latency, proxy, score = figure.axes
    assert marks(latency, 40) == [30.0]
    assert marks(latency, 100) == [50.0]
    assert marks(proxy, 40) == [pytest.approx(60.0)]
    assert marks(proxy, 100) == [pytest.approx(97.0)]
    assert marks(score, 40) == [pytest.approx(utility.scores()[40])]
    assert marks(score, 100) == [pytest.approx(budget.scores()[100])]
    shapes = {(line.get_xdata()[0], line.get_marker()) for line in latency.lines if len(line.get_xdata()) == 1}
    assert shapes == {(40, "o"), (100, "s")}
    assert "chosen: 40 tokens (utility, alpha 0.5)" in labels(latency)
    assert "chosen: 100 tokens (accuracy budget, at most 5% lost)" in labels(latency)
    assert labels(score) == ["utility, alpha 0.5", "accuracy budget, at most 5% lost"]
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "latency of a batch [ms]",
        "soft agreement\n[% of dense]",
        "objective\n[higher is better]",
    ]
    assert [axes.get_xlabel() for axes in figure.axes] == ["", "", "tokens that leave the reducing block"]


def test_points_that_may_not_be_chosen_are_left_out() -> None:
    *_, score = plot_plans([plan(100, lp.AccuracyBudget(0.05))]).axes
    drawn = score.lines[0]
    assert list(drawn.get_xdata()) == [100, 180, 197]
    assert all(math.isfinite(value) for value in drawn.get_ydata())


def test_a_plan_that_stays_dense_is_marked_at_dense() -> None:
    latency, proxy, _ = lp.report.plot(plan(197, lp.Utility(0.0))).axes
    assert marks(latency, 197) == [91.5]
    assert marks(proxy, 197) == [100.0]


def test_more_plans_than_colours() -> None:
    many = [plan(40, lp.Utility(alpha / 10)) for alpha in range(6)]
    assert len(labels(plot_plans(many).axes[2])) == 6


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_saved_in_the_format_of_the_suffix(suffix: str, tmp_path: Path) -> None:
    path = save_figure(plot_profile(profile()), tmp_path / f"curve.{suffix}")
    assert path.read_bytes().startswith({"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[suffix])
    assert list(tmp_path.iterdir()) == [path]


class Result:
    """What a comparison returns, for a plot: something that says its document."""

    def to_dict(self) -> dict[str, Any]:
        return comparison()


@pytest.mark.parametrize(
    ("result", "panels"),
    [
        (profile(), ["latency of a batch [ms]"]),
        (plan(40, lp.Utility()), ["latency of a batch [ms]", "soft agreement\n[% of dense]"]),
        (
            [plan(40, lp.Utility()), plan(100, lp.Utility())],
            ["latency of a batch [ms]", "soft agreement\n[% of dense]"],
        ),
        (comparison(), ["top-1 [%]"]),
        (Result(), ["top-1 [%]"]),
    ],
    ids=["profile", "plan", "plans", "document", "comparison"],
)
def test_plot_draws_by_the_type_of_its_argument(result: Any, panels: list[str], tmp_path: Path) -> None:
    figure = lp.report.plot(result, tmp_path / "plot.png")
    assert [axes.get_ylabel() for axes in figure.axes][: len(panels)] == panels
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("result", [None, [], [1], "plan.json", 3])
def test_plot_refuses_what_it_cannot_draw(result: Any, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=rf"`result`.*{type(result).__name__}"):
        lp.report.plot(result, tmp_path / "plot.png")
    assert list(tmp_path.iterdir()) == []


def test_an_eager_curve_belongs_to_a_profile() -> None:
    with pytest.raises(ArgumentError, match=r"`eager`.*Plan"):
        lp.report.plot(plan(40, lp.Utility()), eager=profile())


def test_a_picture_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "curve.png"
    old.write_bytes(b"old")

    def half(self: Figure, path: Path, **options: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(OSError, match="disk full"):
        save_figure(plot_profile(profile()), old)
    assert old.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [old]
