"""Tables of a comparison on the terminal, and the lines below them."""

from dataclasses import replace
from io import StringIO
from typing import Any

from rich.console import Console

from lightning_prune.profiling import LatencyProfile
from lightning_prune.report.rows import Row
from lightning_prune.report.tables import comparison_table, profile_table, remarks

WHERE: dict[str, Any] = {"images": 2000, "device": "Abacus", "batch_size": 16, "precision": "float32"}
DENSE = Row(variant="dense", removed=0, tokens=197, top1=0.9725, latency_ms=106.99, latency_spread=2.2, **WHERE)


def pruned(method: str, target: float, **more: Any) -> Row:
    figures: dict[str, Any] = {
        "top1": 0.956,
        "top1_change": -0.0165,
        "top1_low": -0.0231,
        "top1_high": -0.0102,
        "agreement": 0.9785,
        "latency_ms": 106.99 / target,
        "latency_spread": 1.1,
        "speedup": target,
        "speedup_spread": 0.02,
    }
    name = f"{method} {target:g}x"
    cut = {"block": "3", "removed": 56, "tokens": 141}
    return Row(
        variant=name, method=method.removesuffix("+int8"), target_speedup=target, **cut, **{**figures, **more}, **WHERE
    )


ROWS = [DENSE, *(pruned(m, t) for m in ("pomt", "vwt-intra+int8", "pomt-nearest") for t in (1.25, 2.0))]


def printed(rows: list[Row]) -> list[str]:
    out = StringIO()
    Console(file=out, width=80).print(comparison_table(rows))
    return out.getvalue().splitlines()


def test_table_has_a_line_for_each_row_fits_eighty_columns_and_cuts_nothing() -> None:
    lines = printed(ROWS)
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
    assert "Abacus, batch 16, float32, 2000 images" in lines[0]
    (dense,) = (line.split() for line in lines if line.split()[:1] == ["dense"])
    assert dense == ["dense", "197", "97.25%", "-", "107.0", "-"]
    (line,) = (line.split() for line in lines if line.split()[:2] == ["vwt-intra+int8", "1.25x"])
    assert line == [*("vwt-intra+int8", "1.25x", "141", "95.60%", "-1.65", "-2.31", "-1.02", "97.9%", "85.59", "1.25x")]


def test_a_latency_of_one_round_has_no_spread() -> None:
    profile = LatencyProfile((1, 9), (1.5, 2.0), (0.0, 0.25), (1, 3), "random", 0, 4)
    out = StringIO()
    Console(file=out, width=80).print(profile_table(profile))
    text = out.getvalue()
    assert "2.00 ± 0.25" in text
    assert "1.50" in text
    assert "1.50 ±" not in text


def test_energy_has_a_column_if_it_is_known() -> None:
    lines = printed([replace(row, joules_per_image=0.1234) for row in ROWS])
    assert max(map(len, lines)) <= 80
    assert any("J/im." in line for line in lines)
    assert sum("0.123" in line for line in lines) == len(ROWS)
    assert not any("same:" in line for line in lines)


def test_a_metric_of_the_module_takes_the_place_of_top1() -> None:
    unknown = dict.fromkeys(("top1", "top1_change", "top1_low", "top1_high"))
    rows = [replace(row, metric=1.234567, metric_name="val/loss", **unknown) for row in ROWS]
    rows = [rows[0], *(replace(row, metric_change=0.01) for row in rows[1:])]
    lines = printed(rows)
    assert max(map(len, lines)) <= 80
    (line,) = (line.split() for line in lines if line.split()[:2] == ["pomt", "2x"])
    assert line == ["pomt", "2x", "141", "1.235", "+0.01", "97.9%", "53.49", "2.00x"]
    assert any("metric: val/loss, better the lower it is" in line for line in lines)


def test_the_words_follow_what_is_known() -> None:
    """A tower logs no top-1 and has no classes; a module without metric may have classes."""
    unknown = dict.fromkeys(("top1", "top1_change", "top1_low", "top1_high"))
    lines = printed([replace(row, agreement=None, **unknown) for row in ROWS])
    assert not any(word in line for line in lines for word in ("top-1", "change", "same:"))
    assert any("accuracy: not known" in line for line in lines)
    (line,) = (line.split() for line in lines if line.split()[:2] == ["pomt", "2x"])
    assert line == ["pomt", "2x", "141", "53.49", "2.00x"]

    lines = printed([replace(row, **unknown) for row in ROWS])
    assert not any(word in line for line in lines for word in ("top-1", "change", "not known"))
    assert any("same: share of images" in line for line in lines)


def test_a_row_without_figures() -> None:
    note = Row(variant="int8", method="int8", int8=True, note="no int8 on abacus", **WHERE)
    (line,) = (line.split() for line in printed([DENSE, note]) if line.split()[:1] == ["int8"])
    assert set(line[1:]) == {"-"}


def test_remarks_below_the_table() -> None:
    note = Row(variant="int8", note="no int8 on abacus")
    unreached = {"method": "pomt", "target_speedup": 6.0, "best": 1.62, "reason": "timed up to 194 removed tokens"}
    document = {
        "rows": [DENSE.to_dict(), note.to_dict()],
        "unreached": [unreached],
        "energy": "n/a (no energy counter on this device)",
        "variants": {"pomt utility": {"reason": "Best by utility."}, "int8": {"note": "no int8 on abacus"}},
    }
    lines = [
        "int8: no int8 on abacus",
        "pomt utility: Best by utility.",
        "pomt cannot reach 6x: at most 1.62x (timed up to 194 removed tokens)",
        "energy: n/a (no energy counter on this device)",
    ]
    assert remarks(document) == lines
    best = {"variant": "pomt utility", "reason": "It is the fastest."}
    assert remarks({**document, "best": best}) == [*lines, "schedule.yaml is that of pomt utility. It is the fastest."]
