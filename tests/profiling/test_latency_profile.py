import json
from dataclasses import replace

import numpy as np
import pytest

from lightning_prune import ArgumentError, FileFormatError, LatencyProfile
from lightning_prune.profiling import CountStep
from lightning_prune.profiling.latency_profile import OverheadProbe
from lightning_prune.report.plots import plot


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
    assert (curve.dense_tokens, curve.dense_ms, curve.latency_ms(150)) == (197, 10, 9)


def test_latency_of_a_count_that_was_not_measured_is_refused():
    with pytest.raises(ArgumentError, match=r"`tokens` must be one of the measured counts \(100, 197\), got 150"):
        profile({100: 7, 197: 10}).latency_ms(150)


def test_finds_every_planted_cliff_to_the_token():
    curve = profile(stairs(200, step=64, height=4.0))
    assert [(cliff.above, cliff.below) for cliff in curve.cliffs()] == [(193, 192), (129, 128), (65, 64)]
    assert all(cliff.saved == pytest.approx(4.0) for cliff in curve.cliffs())


def test_plateaus_lie_between_the_cliffs():
    curve = profile(stairs(200, step=64, height=4.0))
    assert CountStep(192, 129, 0.0) in curve.plateaus()
    assert CountStep(128, 65, 0.0) in curve.plateaus()


def test_straight_line_has_neither_cliffs_nor_plateaus():
    curve = profile({count: 1 + 0.05 * count for count in range(20, 198)})
    assert curve.cliffs() == []
    assert curve.plateaus() == []


def test_noise_is_no_cliff():
    points = dict.fromkeys(range(20, 198, 8), 10.0) | {197: 10.0}
    points[100] -= 1.0
    assert profile(points, spread=0.02).cliffs() != []
    assert profile(points, spread=2.0).cliffs() == []


def test_faster_than_dense_means_beyond_noise_and_by_two_percent():
    curve = profile({100: 8.0, 150: 9.81, 197: 10.0})
    assert curve.is_faster_than_dense(100)
    assert not curve.is_faster_than_dense(150)
    assert not profile({100: 8.0, 197: 10.0}, spread=3.0).is_faster_than_dense(100)


def test_one_round_has_an_infinite_standard_error():
    """A single measurement has no spread; that must not pass for certainty."""
    curve = profile({100: 5.0, 197: 10.0}, spread=0.0, rounds=1)
    assert curve.stderr_ms(100) == float("inf")
    assert not curve.is_faster_than_dense(100)
    assert curve.cliffs() == []


def test_standard_error_is_infinite_unless_most_counts_have_three_rounds():
    """Dense is in all rounds, and so in more than any other count."""
    curve = LatencyProfile((32, 64, 197), (5.0, 6.0, 10.0), (0.0,) * 3, (1, 1, 3), "pomt", 3, 12)
    assert curve.stderr_ms(197) == float("inf")
    assert curve.is_inconclusive
    assert LatencyProfile((32, 64, 197), (5.0, 6.0, 10.0), (0.1,) * 3, (3, 1, 3), "pomt", 3, 12).is_faster_than_dense(
        32
    )


@pytest.mark.parametrize("rounds", [3, 5, 9, 31])
def test_error_is_that_of_the_median_however_few_the_rounds(rounds):
    random, spreads = np.random.default_rng(0), []
    for _ in range(4000):
        left = random.standard_normal(rounds)
        low, high = np.percentile(left - left.mean(), (25, 75))
        spreads.append((high - low) / 2)
    curve = profile({100: 9.9, 197: 10.0}, spread=float(np.mean(spreads)), rounds=rounds)
    assert curve.stderr_ms(197) == pytest.approx(1.2533 / rounds**0.5, rel=0.12)


def test_beginning_of_a_slope_is_no_cliff():
    curve = profile({20: 20.0, 40: 30.0, 70: 45.0, 100: 60.0, 120: 60.5, 150: 61.0, 180: 61.5})
    assert curve.cliffs() == []


def test_flat_curve_has_no_slope():
    curve = profile({100: 10.5, 197: 10.0})
    assert curve.ms_per_token == 0.0
    assert not curve.is_faster_than_dense(100)


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_round_trip(tmp_path, suffix):
    curve = profile(stairs(60, 16, 1.0))
    assert LatencyProfile.load(curve.save(tmp_path / f"profile.{suffix}")) == curve


def test_a_profile_of_an_older_release_loads(tmp_path):
    """A document as version 1 was written: `converged` was called `settled`, and could be left out."""
    text = """
{"format": "lightning_prune.profile", "version": 1, "tokens": [100, 197], "milliseconds": [7.0, 10.5],
 "spread": [0.1, 0.2], "rounds": [7, 31], "method": "pomt", "block": 3, "depth": 12, "protocol": "deployed",
 "seconds": 12.5, "context": {"device": "Abacus", "threads": 2, "timm": "1.0.23"}SETTLED}
"""
    path = tmp_path / "old.json"
    for settled, converged in (("", False), (', "settled": true', True), (', "settled": false', False)):
        path.write_text(text.replace("SETTLED", settled))
        context = {"device": "Abacus", "threads": 2, "timm": "1.0.23"}
        assert LatencyProfile.load(path) == LatencyProfile(
            *((100, 197), (7.0, 10.5), (0.1, 0.2), (7, 31), "pomt", 3, 12), seconds=12.5, context=context,
            converged=converged,
        )  # fmt: skip


def test_quartiles_are_saved_and_profiles_of_version_2_load_without_them(tmp_path):
    known = replace(profile({100: 7, 197: 10}), low_ms=(6.9, 9.5), high_ms=(7.5, 12.0))
    path = known.save(tmp_path / "profile.json")
    assert LatencyProfile.load(path) == known
    document = json.loads(path.read_text())
    del document["low_ms"], document["high_ms"]
    path.write_text(json.dumps(document | {"version": 2}))
    assert LatencyProfile.load(path) == replace(known, low_ms=(), high_ms=())


@pytest.mark.parametrize(
    ("low", "high"),
    [
        ((6.9,), (7.5,)),
        ((6.9, 9.5), ()),
        ((6.9, 9.5), (7.5, 9.0)),
        ((0.0, 9.5), (7.5, 12.0)),
        ((6.9, 9.5), (7.5, float("inf"))),
        ((6.9, float("nan")), (7.5, 12.0)),
    ],
)
def test_quartiles_must_be_one_pair_a_count_and_in_order(low, high):
    with pytest.raises(ArgumentError, match="`low_ms`"):
        replace(profile({100: 7, 197: 10}), low_ms=low, high_ms=high)


def test_load_names_the_file_and_what_is_wrong(tmp_path):
    path = profile({100: 7, 197: 10}).save(tmp_path / "profile.json")
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    with pytest.raises(FileFormatError, match=r"profile\.json is damaged or not a lightning_prune\.profile file"):
        LatencyProfile.load(path)
    path.write_text(json.dumps({**json.loads(whole), "milliseconds": [1.0]}))
    with pytest.raises(
        FileFormatError, match=r"profile\.json is not a usable lightning_prune\.profile file: .*one length"
    ):
        LatencyProfile.load(path)
    for wrong, message in (
        ({"spread": ["a", "b"]}, "must be numbers, got 'a'"),
        ({"block": "x"}, "must be numbers, got 'x'"),
        ({"tokens": [100, 197.5]}, "`tokens`, .* must be integers, got 197.5"),
    ):
        path.write_text(json.dumps({**json.loads(whole), **wrong}))
        with pytest.raises(FileFormatError, match=message):
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
    ("wrong", "message"),
    [
        ({"rounds": [0, 9]}, "`rounds` must be >= 1, got 0"),
        ({"spread": [-1.0, 0.1]}, r"`spread` must be finite and >= 0, got \[-1.0, 0.1\]"),
        ({"spread": [float("nan"), 0.1]}, "`spread` must be finite and >= 0"),
        ({"milliseconds": [True, 2.0]}, "must be numbers, got True"),
        ({"method": 3}, "`method` of a profile must be a name, got 3"),
        ({"protocol": "mine"}, "`protocol` of a profile must be 'deployed' or 'paper', got 'mine'"),
        ({"seconds": "x"}, "`seconds` of a profile must be a number, got 'x'"),
        ({"context": None}, "`context` of a profile must be a mapping, got None"),
        ({"converged": 1}, "`converged` of a profile must be true or false, got 1"),
    ],
)
def test_impossible_entries_are_refused(wrong, message):
    document = profile({100: 7.0, 197: 10.0}).to_dict()
    with pytest.raises(FileFormatError, match=message):
        LatencyProfile.from_dict({**document, **wrong})


@pytest.mark.parametrize(
    ("points", "message"),
    [({100: 0.0, 197: 10.0}, "positive and finite"), ({100: float("nan"), 197: 10.0}, "positive and finite")],
)
def test_impossible_measurements_are_refused(points, message):
    with pytest.raises(ArgumentError, match=message):
        profile(points)


def test_plot_marks_cliffs_and_plateaus(tmp_path):
    figure = plot(profile(stairs(200, step=64, height=4.0)), tmp_path / "profile.png")
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert {"cliff", "plateau", "measured"} <= set(labels)
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")


PROBE = OverheadProbe("tome", (8, 0, 4), depth_ratio=0.3, ratio=1.1, ratio_spread=0.01, rounds=9)


def test_probes_are_saved_and_profiles_of_version_3_load_without_them(tmp_path):
    curve = replace(profile({100: 7, 197: 10}), probes=(PROBE, PROBE._replace(method="topk")))
    path = curve.save(tmp_path / "profile.json")
    assert LatencyProfile.load(path) == curve
    document = json.loads(path.read_text())
    assert document["probes"][0]["removed"] == [8, 0, 4]
    del document["probes"]
    with pytest.raises(FileFormatError, match="must have the entry 'probes'"):
        LatencyProfile.from_dict(document)
    assert LatencyProfile.from_dict(document | {"version": 3}) == replace(curve, probes=())


@pytest.mark.parametrize(
    "wrong",
    [
        {"method": None},
        {"removed": ()},
        {"removed": (1,) * 13},
        {"removed": (-1,)},
        {"ratio": 0.0},
        {"ratio": float("nan")},
        {"depth_ratio": -1.0},
        {"ratio_spread": -0.1},
        {"rounds": 0},
    ],
)
def test_impossible_probes_are_refused(wrong):
    with pytest.raises(ArgumentError, match="`probes` must be timings of schedules of at most 12 blocks"):
        replace(profile({100: 7, 197: 10}), probes=(PROBE._replace(**wrong),))
