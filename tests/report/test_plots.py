from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import lightning_prune as lp
from lightning_prune.errors import ArgumentError
from lightning_prune.planning import Candidate
from lightning_prune.reduction import POMT
from lightning_prune.report import plots
from lightning_prune.report.plots import plot_profile
from lightning_prune.report.styles import save_figure

from .made_up import comparison

CONTEXT = {"model": "VisionTransformer", "device": "Abacus", "batch_size": 4, "precision": "float32"}
# Milliseconds at token counts: a cliff between 100 and 120, a plateau from 197 down to 120.
CURVE = {40: 30.0, 70: 40.0, 100: 50.0, 120: 90.0, 150: 90.5, 180: 91.0, 197: 91.5}


def profile(**changes: Any) -> lp.LatencyProfile:
    quartiles = {"low_ms": tuple(ms - 0.5 for ms in CURVE.values()), "high_ms": tuple(ms + 3 for ms in CURVE.values())}
    columns = {"milliseconds": tuple(CURVE.values()), "spread": (1.0,) * len(CURVE), "rounds": (49,) * len(CURVE)}
    columns |= quartiles
    facts = {"method": "pomt", "block": 3, "depth": 12, "context": CONTEXT}
    return lp.LatencyProfile(tokens=tuple(CURVE), **{**columns, **facts, **changes})


def plan(tokens: int, objective: Any) -> lp.Plan:
    schedule = lp.Schedule.single(12, 3, 197 - tokens)
    dense = Candidate("pomt", POMT(), lp.Schedule([0] * 12), 1.0, accuracy=1.0)
    chosen = Candidate("pomt", POMT(), schedule, 0.5, 0.1, 0.97)
    return lp.Plan(
        schedule, "pomt", POMT(), objective, True, "Because.", profile(), front=(dense, chosen), label="pomt"
    )


def labels(axes: Axes) -> list[str]:
    return [text.get_text() for legend in axes.get_figure().legends for text in legend.get_texts()]


def spans(axes: Axes, color: str) -> list[tuple[float, float]]:
    from matplotlib.colors import to_rgb

    found = [patch for patch in axes.patches if to_rgb(patch.get_facecolor()[:3]) == to_rgb(color)]
    boxes = [patch.get_extents().transformed(axes.transData.inverted()) for patch in found]
    return [(round(box.x0), round(box.x1)) for box in boxes]


def test_profile_shows_curve_spread_cliff_and_plateau() -> None:
    (axes,) = plot_profile(profile()).axes
    curve = next(line for line in axes.lines if line.get_label() == "measured")
    assert dict(zip(curve.get_xdata().tolist(), curve.get_ydata().tolist(), strict=True)) == CURVE
    assert labels(axes) == [
        "measured",
        "quartiles, measured",
        "straight line between the ends",
        "cliff",
        "plateau",
    ]
    assert spans(axes, plots._RED) == [(100, 120)]
    assert spans(axes, plots._GREY) == [(120, 197)]
    assert axes.get_xlabel() == "tokens that leave the last reducing block"
    assert axes.get_ylabel() == "latency of a batch [ms], measured"
    assert axes.get_ylim()[0] == 0


def test_profile_says_what_was_measured_and_where() -> None:
    of_method = plot_profile(profile())
    assert of_method.get_suptitle() == "VisionTransformer: latency with pomt from block 3\nAbacus, batch 4, float32"


@pytest.mark.parametrize(
    "changes",
    [
        {"protocol": "paper"},
        {"method": "random", "block": 0},
        {"method": "random", "block": 0, "context": {**CONTEXT, "method_settings": {"site": "'input'"}}},
    ],
    ids=["paper", "of an earlier release", "token curve"],
)
def test_token_curve_is_named_as_what_it_is(changes: dict[str, Any]) -> None:
    figure = plot_profile(profile(**changes))
    title = figure.get_suptitle().splitlines()[0]
    assert title == "VisionTransformer: latency against token count (random tokens dropped before block 0)"
    assert figure.axes[0].get_xlabel() == "tokens in every block"


def test_random_tokens_dropped_between_attention_and_mlp_are_no_token_curve() -> None:
    context = {**CONTEXT, "method_settings": {"site": "'block'"}}
    title = plot_profile(profile(method="random", block=0, context=context)).get_suptitle()
    assert title.startswith("VisionTransformer: latency with random from block 0")


def test_simulated_profile_is_named_as_such() -> None:
    (axes,) = plot_profile(profile(context={**CONTEXT, "device_type": "simulated"})).axes
    assert "simulated" in labels(axes)
    assert "measured" not in labels(axes)
    assert axes.get_ylabel() == "latency of a batch [ms], simulated"


def test_a_single_point_can_be_drawn() -> None:
    short = lp.LatencyProfile((197,), (1.0,), (0.1,), (3,), "pomt", 3, 12, context=CONTEXT)
    (axes,) = plot_profile(short).axes
    assert labels(axes) == ["measured"]


def band(axes: Axes) -> list[tuple[float, float]]:
    """The lowest and the highest point of the band at each token count."""
    (drawn,) = axes.collections
    corners = drawn.get_paths()[0].vertices.tolist()
    heights = {count: [y for x, y in corners if x == count] for count in CURVE}
    return [(min(all_), max(all_)) for all_ in heights.values()]


def test_the_band_is_the_quartiles_and_not_symmetric_about_the_median() -> None:
    (axes,) = plot_profile(profile()).axes
    assert band(axes) == [(ms - 0.5, ms + 3) for ms in CURVE.values()]


@pytest.mark.parametrize(
    "quartiles", [{"low_ms": (), "high_ms": ()}, dict.fromkeys(("low_ms", "high_ms"), tuple(CURVE.values()))]
)
def test_no_band_without_quartiles_or_after_single_rounds(quartiles: dict[str, Any]) -> None:
    (axes,) = plot_profile(profile(**quartiles)).axes
    assert not axes.collections
    assert not any("quartiles" in label for label in labels(axes))


def in_runtime(name: str, factor: float = 1.0) -> lp.LatencyProfile:
    names = ("milliseconds", "low_ms", "high_ms")
    columns = {name: tuple(factor * ms for ms in getattr(profile(), name)) for name in names}
    return profile(**columns, context={**CONTEXT, "runtime": name})


def test_two_curves_have_a_band_each() -> None:
    axes, _ = plot_profile(in_runtime("onnxruntime"), [in_runtime("torch")]).axes
    assert len(axes.collections) == 2
    assert [text for text in labels(axes) if "quartiles" in text] == [
        "quartiles, measured, onnxruntime",
        "quartiles, measured, torch",
    ]


def test_shapes_of_several_runtimes_are_over_their_own_dense() -> None:
    """A runtime that is twice as fast at every count has the same shape."""
    _, shapes = plot_profile(in_runtime("torch"), [in_runtime("openvino", 0.5)]).axes
    curves = [line.get_ydata() for line in shapes.lines if len(line.get_xdata()) == len(CURVE)]
    assert curves[0].tolist() == pytest.approx(curves[1].tolist())
    assert curves[0][-1] == pytest.approx(100)
    assert len(curves) == 2


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
        (profile(), ["latency of a batch [ms], measured"]),
        (plan(40, lp.Utility()), ["proxy, measured\n[% of dense]", "KL divergence from dense,\npredicted [nats]"]),
        (comparison(), ["top-1 [%]"]),
        (Result(), ["top-1 [%]"]),
    ],
    ids=["profile", "plan", "document", "comparison"],
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


def test_other_curves_belong_to_a_profile() -> None:
    with pytest.raises(ArgumentError, match=r"`others`.*Plan"):
        lp.report.plot(plan(40, lp.Utility()), others=[profile()])
    with pytest.raises(ArgumentError, match=r"`others` must be a list of LatencyProfiles, got \[3\]"):
        lp.report.plot(profile(), others=[3])


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
