import json

import pytest

from lightning_prune import ArgumentError, FileFormatError, LatencyProfile
from lightning_prune.profiling import Span


def profile(points, spread=0.001, rounds=9):
    """A profile from {tokens: milliseconds}."""
    tokens = sorted(points)
    return LatencyProfile(
        tokens=tuple(tokens),
        milliseconds=tuple(float(points[count]) for count in tokens),
        spread=(spread,) * len(tokens),
        rounds=(rounds,) * len(tokens),
        method="pomt",
        block=3,
        depth=12,
        context={"device": "a device", "batch_size": 4, "precision": "float32", "model": "ViT"},
    )


def stairs(n, step, height, base=10.0):
    """Latency of hardware that works in waves of `step` tokens."""
    return {count: base + height * -(-count // step) for count in range(20, n + 1)}


def test_dense_is_the_largest_count():
    curve = profile({100: 7, 197: 10, 150: 9})
    assert (curve.dense_tokens, curve.dense_ms, curve.at(150)) == (197, 10, 9)


def test_at_interpolates_nothing():
    with pytest.raises(ArgumentError, match=r"`tokens` must be one of the measured counts \(100, 197\), got 150"):
        profile({100: 7, 197: 10}).at(150)


def test_finds_every_planted_cliff_to_the_token():
    curve = profile(stairs(200, step=64, height=4.0))
    assert [(cliff.above, cliff.below) for cliff in curve.cliffs()] == [(193, 192), (129, 128), (65, 64)]
    assert all(cliff.saved == pytest.approx(4.0) for cliff in curve.cliffs())


def test_plateaus_lie_between_the_cliffs():
    curve = profile(stairs(200, step=64, height=4.0))
    assert Span(192, 129, 0.0) in curve.plateaus()
    assert Span(128, 65, 0.0) in curve.plateaus()


def test_a_straight_line_has_neither():
    curve = profile({count: 1 + 0.05 * count for count in range(20, 198)})
    assert curve.cliffs() == []
    assert curve.plateaus() == []


def test_noise_is_no_cliff():
    points = dict.fromkeys(range(20, 198, 8), 10.0) | {197: 10.0}
    points[100] -= 1.0
    assert profile(points, spread=0.02).cliffs() != []
    assert profile(points, spread=2.0).cliffs() == []


def test_saves_needs_more_than_noise_and_more_than_two_percent():
    curve = profile({100: 8.0, 150: 9.81, 197: 10.0})
    assert curve.saves(100)
    assert not curve.saves(150)
    assert not profile({100: 8.0, 197: 10.0}, spread=3.0).saves(100)


def test_one_round_proves_nothing():
    """A single measurement has no spread; that must not pass for certainty."""
    curve = profile({100: 5.0, 197: 10.0}, spread=0.0, rounds=1)
    assert curve.error(100) == float("inf")
    assert not curve.saves(100)
    assert curve.cliffs() == []


def test_flat_curve_has_no_slope():
    curve = profile({100: 10.5, 197: 10.0})
    assert curve.per_token == 0.0
    assert not curve.saves(100)


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_round_trip(tmp_path, suffix):
    curve = profile(stairs(60, 16, 1.0))
    assert LatencyProfile.load(curve.save(tmp_path / f"profile.{suffix}")) == curve


def test_load_names_the_file_and_what_is_wrong(tmp_path):
    path = profile({100: 7, 197: 10}).save(tmp_path / "profile.json")
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    with pytest.raises(FileFormatError, match=r"profile\.json is damaged or not a lightning_prune\.profile file"):
        LatencyProfile.load(path)
    path.write_text(json.dumps({**json.loads(whole), "milliseconds": [1.0]}))
    with pytest.raises(FileFormatError, match=r"profile\.json is not a usable profile: .*one length"):
        LatencyProfile.load(path)
    for wrong in ({"spread": ["a", "b"]}, {"block": "x"}, {"tokens": [100, 197.5]}):
        path.write_text(json.dumps({**json.loads(whole), **wrong}))
        with pytest.raises(FileFormatError, match="must be numbers, all else in a profile whole numbers"):
            LatencyProfile.load(path)
    document = json.loads(whole)
    del document["block"]
    path.write_text(json.dumps(document))
    with pytest.raises(FileFormatError, match="'block'"):
        LatencyProfile.load(path)
    path.write_text(json.dumps({"format": "lightning_prune.schedule"}))
    with pytest.raises(FileFormatError, match=r"has format 'lightning_prune\.schedule'"):
        LatencyProfile.load(path)


@pytest.mark.parametrize(
    ("points", "message"),
    [({100: 0.0, 197: 10.0}, "positive and finite"), ({100: float("nan"), 197: 10.0}, "positive and finite")],
)
def test_impossible_measurements_are_refused(points, message):
    with pytest.raises(ArgumentError, match=message):
        profile(points)


def test_plot_marks_cliffs_and_plateaus(tmp_path):
    figure = profile(stairs(200, step=64, height=4.0)).plot(tmp_path / "profile.png")
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert {"cliff", "plateau", "measured"} <= set(labels)
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")
