from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from lightning_prune.errors import DataError
from lightning_prune.report.pareto import plot_pareto
from lightning_prune.report.plots import plot
from lightning_prune.report.styles import line_styles

from .made_up import LOST, comparison, planned, row, without_accuracy


def lines(axes: Axes) -> dict[str, ErrorbarContainer]:
    return {str(each.get_label()): each for each in axes.containers if isinstance(each, ErrorbarContainer)}


def points(line: ErrorbarContainer) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in zip(*line[0].get_data(), strict=True)]


def notes(figure: Figure) -> str:
    """What stands below the axes."""
    return str(figure.legends[0].get_title().get_text() if figure.legends else figure.get_supxlabel())


def test_every_method_is_a_line_at_its_figures() -> None:
    document = comparison()
    found = lines(plot_pareto(document).axes[0])
    assert set(found) == {"dense", "int8", *LOST}
    for name in ("pomt", "pomt+int8"):
        wanted = [
            (row["latency_ms"], 100 * row["top1"])
            for row in document["rows"]
            if row["method"] == "pomt" and row["int8"] == (name != "pomt")
        ]
        assert points(found[name]) == [pytest.approx(point) for point in wanted]
    assert points(found["dense"]) == [pytest.approx((106.99, 93.1))]


def test_bars_are_the_spread_and_the_interval_of_the_change() -> None:
    document = comparison()
    row = next(row for row in document["rows"] if row["variant"] == "tome 1.5x")
    _, _, (across, upright) = lines(plot_pareto(document).axes[0])["tome"]
    (left, _), (right, _) = across.get_segments()[2]
    assert (left, right) == pytest.approx((row["latency_low_ms"], row["latency_high_ms"]))
    (_, low), (_, high) = upright.get_segments()[2]
    assert (low, high) == pytest.approx((93.1 + 100 * row["top1_low"], 93.1 + 100 * row["top1_high"]))


def test_results_without_quartiles_have_no_bars_of_latency() -> None:
    document = comparison()
    for each in document["rows"]:
        del each["latency_low_ms"], each["latency_high_ms"]
    _, _, (across, _) = lines(plot_pareto(document).axes[0])["tome"]
    for (left, _), (right, _) in across.get_segments():
        assert left == right


def test_a_second_panel_shows_what_is_near_dense_only_where_the_range_is_wide() -> None:
    figure = plot_pareto(comparison())
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["", "the same, near dense"]
    low, high = figure.axes[1].get_ylim()
    assert low < 93.1 < high
    assert high - low < 8
    assert len(plot_pareto(planned()).axes) == 1


@pytest.mark.parametrize("name", ["val/miou", "val/loss"])
def test_a_metric_of_the_module_has_a_second_panel_too(name: str) -> None:
    sign = -1 if name == "val/loss" else 1
    figures = {"dense": 0.9, "a": 0.899, "b": 0.898, "c": 0.895, "resize": 0.7}
    rows = [
        row(each, method=each, latency_ms=20.0 - place, top1=None, metric=sign * figure, metric_name=name)
        for place, (each, figure) in enumerate(figures.items())
    ]
    figure = plot_pareto({"rows": [{**rows[0], "method": ""}, *rows[1:]]})
    assert len(figure.axes) == 2
    bottom, top = figure.axes[1].get_ylim()
    assert [sign * bottom, sign * top] == pytest.approx([0.9 - 1.25 * 0.005, 0.9 + 0.25 * 0.005])


def test_no_second_panel_without_dense_in_it() -> None:
    figures = {"dense": 0.90, "a": 0.96, "b": 0.959, "c": 0.958, "d": 0.80}
    rows = [
        row(each, method="" if each == "dense" else each, latency_ms=20.0 - place, top1=figure)
        for place, (each, figure) in enumerate(figures.items())
    ]
    assert len(plot_pareto({"rows": rows}).axes) == 1


def test_speed_ups_stand_above_their_latency() -> None:
    figure = plot_pareto(comparison())
    figure.draw_without_rendering()
    above = figure.axes[0].child_axes[0]
    ticks = {
        label.get_text(): float(place) for place, label in zip(above.get_xticks(), above.get_xticklabels(), strict=True)
    }
    assert ticks["1x"] == pytest.approx(106.99)
    assert ticks["2x"] == pytest.approx(106.99 / 2)


def test_front_line_joins_the_rows_that_no_other_beats() -> None:
    (front,) = [line for line in plot_pareto(comparison()).axes[0].lines if line.get_label() == "Pareto front"]
    heights = [float(height) for height in front.get_ydata()]
    assert heights == pytest.approx([88.8, 92.3, 92.95, 93.15])  # dense is both slower and below tome at 1.1x


def test_agreement_takes_the_place_of_an_accuracy_that_is_not_logged() -> None:
    figure = plot_pareto(without_accuracy(comparison()))
    assert figure.axes[0].get_ylabel() == "agreement with dense [%]"
    found = lines(figure.axes[0])
    assert points(found["dense"]) == [pytest.approx((106.99, 100.0))]
    assert len(found) == 2 + len(LOST)


def test_unknown_accuracy_is_stated_in_the_plot() -> None:
    axes = plot_pareto(without_accuracy(comparison(), "agreement")).axes[0]
    assert "the module logs no val/top1" in axes.texts[0].get_text()
    assert not lines(axes)


def test_rows_without_figures_are_not_drawn() -> None:
    refused = row("shift 2x", method="shift", target_speedup=2.0, latency_ms=None, top1=None, note="No such layer.")
    figure = plot_pareto({"rows": [*planned()["rows"], refused]})
    assert set(lines(figure.axes[0])) == {"dense", "pomt"}


def in_runtimes(document: dict[str, Any]) -> dict[str, Any]:
    """The rows of a comparison, in each of three runtimes."""
    names = ("torch", "onnxruntime", "openvino")
    rows = [
        {**row, "variant": f"{row['variant']} [{name}]", "runtime": name} for name in names for row in document["rows"]
    ]
    return {**document, "rows": rows}


@pytest.mark.parametrize(
    "document", [comparison(), planned(), without_accuracy(comparison()), in_runtimes(comparison())]
)
def test_legend_is_below_the_axes_and_covers_no_text(document: dict[str, Any]) -> None:
    figure = plot_pareto(document)
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    assert legend.x0 >= 0
    assert legend.x1 <= figure.bbox.width
    assert legend.y1 <= min(axes.xaxis.label.get_window_extent().y0 for axes in figure.axes if axes.get_xlabel())


def test_no_rows_are_refused() -> None:
    with pytest.raises(DataError, match="'rows'"):
        plot_pareto({"rows": []})


def test_styles_are_told_apart_and_int8_looks_like_its_method() -> None:
    names = [*LOST, "int8", *(f"method {number}" for number in range(9))]
    styles = line_styles(names)
    assert styles["pomt+int8"] == (*styles["pomt"][:2], True)
    assert styles["int8"][2]
    assert not styles["pomt"][2]
    assert len(set(styles.values())) == len(names)


@pytest.mark.parametrize("document", [comparison(), planned(), without_accuracy(comparison(), "agreement")])
def test_saved_whole(document: dict[str, Any], tmp_path: Path) -> None:
    figure = plot(document, tmp_path / "pareto.png")
    assert figure.get_suptitle() == plot_pareto(document).get_suptitle()
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["pareto.png"]


def test_variants_far_slower_than_dense_are_named_below_the_plot() -> None:
    document = comparison()
    int8 = document["rows"].pop() | {"latency_ms": 1658.7, "speedup": 0.065}
    figure = plot_pareto({**document, "rows": [*document["rows"], int8]})
    assert set(lines(figure.axes[0])) == {"dense", *LOST}
    assert figure.axes[0].get_xlim()[1] < 1.25 * 106.99
    assert notes(figure).endswith("\nOff the chart: int8, 1659 ms, 93.00% top-1.")
    assert "Off the chart" not in notes(plot_pareto(comparison()))
    unknown = without_accuracy({"rows": [document["rows"][0], int8]}, "agreement")
    assert notes(plot_pareto(unknown)) == "Off the chart: int8, 1659 ms."


@pytest.mark.parametrize(("name", "lower"), [("val/loss", True), ("val/f1", False)])
def test_metric_of_the_module_is_drawn_in_its_own_unit_with_better_up(name: str, lower: bool) -> None:
    document = without_accuracy(comparison())
    rows = [row | {"metric": 1.0 + 0.01 * place, "metric_name": name} for place, row in enumerate(document["rows"])]
    axes = plot_pareto(document | {"rows": rows}).axes[0]
    assert axes.get_ylabel() == name
    bottom, top = axes.get_ylim()
    assert bool(bottom > top) is lower
    wanted = [(row["latency_ms"], row["metric"]) for row in rows if row["method"] == "tome"]
    assert points(lines(axes)["tome"]) == [pytest.approx(point) for point in wanted]


def test_metrics_that_are_paired_by_image_have_their_interval() -> None:
    document = without_accuracy(comparison())
    own = {"metric": 0.9, "metric_change": -0.01, "metric_low": -0.03, "metric_high": 0.02, "metric_name": "iou"}
    rows = [row | (own if row["method"] else {"metric": 0.91, "metric_name": "iou"}) for row in document["rows"]]
    figure = plot_pareto(document | {"rows": rows})
    _, _, (_, upright) = lines(figure.axes[0])["tome"]
    (_, low), (_, high) = upright.get_segments()[1]
    assert (low, high) == pytest.approx((0.9 - 0.02, 0.9 + 0.03))
    assert any("95% interval" in text for text in legend_titles(figure))


def legend_titles(figure: Figure) -> list[str]:
    return [legend.get_title().get_text() for legend in figure.legends]
