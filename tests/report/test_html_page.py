import base64
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_prune.errors import DataError
from lightning_prune.report.html_page import write_page
from lightning_prune.report.pareto import plot_pareto

from .made_up import comparison, planned, pruned, row, without_accuracy

VOID = {"meta", "img", "br", "wbr"}
PIXEL = base64.b64decode(
    b"iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNkYAAAAAYAAjCB0C8AAAAASUVORK5CYII="
)
HOSTILE = "<script>alert(1)</script>\"'&"


class Page(HTMLParser):
    """Every element must be closed in its turn; keeps the tags, the attributes and the cells of the table."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.headings: list[str] = []
        self.items: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag in ("h1", "h2"):
            self.headings.append("")
        if tag == "li":
            self.items.append("")
        if tag in ("br", "small"):
            self.handle_data(" ")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data
        if {"h1", "h2"} & set(self.open):
            self.headings[-1] += data
        if "li" in self.open:
            self.items[-1] += data


def results(found: Page) -> list[list[str]]:
    """The rows of the main table, its header first."""
    return found.rows[next(number for number, cells in enumerate(found.rows) if cells[0] == "variant") :]


def page(document: dict[str, Any], folder: Path) -> Page:
    path = write_page(document, folder)
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_page_has_its_headings_in_order(tmp_path: Path) -> None:
    for name in ("pareto.png", "tokens.png", "profile.png"):
        (tmp_path / name).write_bytes(PIXEL)
    found = page(comparison(), tmp_path)
    assert found.headings == [
        "Token reductions compared: VisionTransformer on AMD EPYC",
        "Best at each speed-up",
        "Warnings",
        "Results",
        "Accuracy against latency",
        "What each method keeps",
        "Latency profile",
        "How to read this",
        "Schedules",
        "Command",
        "Measured on",
    ]
    assert "AMD EPYC, 2 threads, batch 16, float32, 2000 images, 2026-11-21 10:31" in found.text
    assert comparison()["command"] in found.text
    assert "n/a (no energy counter on this device)" in found.text


def test_page_has_no_scripts_and_loads_no_files(tmp_path: Path) -> None:
    for name in ("pareto.png", "tokens.png"):
        (tmp_path / name).write_bytes(PIXEL)
    found = page(comparison(), tmp_path)
    tags = {tag for tag, _ in found.tags}
    assert not tags & {"script", "link", "iframe", "object"}
    sources = [attributes["src"] or "" for _, attributes in found.tags if "src" in attributes]
    assert len(sources) == 2
    assert all(base64.b64decode(source.removeprefix("data:image/png;base64,")) == PIXEL for source in sources)
    assert "url(" not in (tmp_path / "report.html").read_text()
    assert "http" not in (tmp_path / "report.html").read_text()


def test_page_has_a_language_alternative_texts_and_scopes(tmp_path: Path) -> None:
    (tmp_path / "pareto.png").write_bytes(PIXEL)
    found = page(comparison(), tmp_path)
    attributes = dict(found.tags)
    assert attributes["html"] == {"lang": "en"}
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in found.tags
    assert all(len(each["alt"] or "") > 20 for tag, each in found.tags if tag == "img")
    assert all("scope" in each for tag, each in found.tags if tag == "th")
    scrolling = [each for _, each in found.tags if each.get("class") == "wide"]
    assert len(scrolling) == 3
    assert all(each["tabindex"] == "0" and each["role"] == "region" and each["aria-label"] for each in scrolling)


def test_table_has_every_row_under_its_target(tmp_path: Path) -> None:
    document = comparison()
    rows = results(page(document, tmp_path))
    assert rows[0][:4] == ["variant", "top-1", "change, points 95% interval", "speed-up"]
    first = [each[0] for each in rows]
    assert {each["variant"] for each in document["rows"]} <= set(first)
    assert [name for name in first if name.startswith(("Target", "No target"))] == [
        "No target",
        "Target 1.1x",
        "Target 1.25x",
        "Target 1.5x",
        "Target 2x",
    ]
    tome = rows[first.index("tome 1.5x")]
    assert tome[:5] == ["tome 1.5x", "92.30%", "\u22120.80 \u22121.28 to \u22120.32", "1.53x ±0.01", "69.93 ±0.78"]
    assert tome[5:8] == ["109.5", "108", "89 12 blocks"]
    assert rows[first.index("dense")][2:4] == ["-", "1.00x"]


BEST = {"variant": "tome 1.5x", "reason": "The best of 32 variants by accuracy budget.", "met": True}


def test_the_variant_to_deploy_and_its_command_come_first(tmp_path: Path) -> None:
    found = page(comparison() | {"best": BEST}, tmp_path)
    assert found.headings[1] == "Deploy this one"
    top = found.text.partition("Best at each speed-up")[0]
    assert "tome 1.5x. The best of 32 variants by accuracy budget." in top
    assert "lightning-prune validate --config configs/cifar10.yaml --prune.schedule schedule.yaml" in top


@pytest.mark.parametrize(
    ("command", "deploying"),
    [
        (
            "lightning-prune compare --model.model=vit --data ImageFolderData --data.root 'my data' --output out",
            "lightning-prune validate --model.model=vit --data ImageFolderData --data.root 'my data' "
            "--prune.schedule schedule.yaml",
        ),
        ("lightning_prune.compare(...)", 'lightning_prune.patch(model, "schedule.yaml")'),
        ("lightning-prune compare --config 'open", 'lightning_prune.patch(model, "schedule.yaml")'),
    ],
)
def test_deploying_keeps_the_options_of_model_and_data(command: str, deploying: str, tmp_path: Path) -> None:
    found = page(comparison() | {"best": BEST, "command": command}, tmp_path)
    assert deploying in found.text.partition("Best at each speed-up")[0]


def test_deploying_names_the_runtime_of_the_variant_among_several(tmp_path: Path) -> None:
    def in_runtime(row: dict[str, Any], runtime: str) -> dict[str, Any]:
        return row | {"variant": f"{row['variant']} [{runtime}]", "runtime": runtime}

    document = comparison()
    rows = [in_runtime(row, runtime) for runtime in ("torch", "torch.compile:mode=blocks") for row in document["rows"]]
    for runtime in ("torch", "torch.compile:mode=blocks"):
        best = BEST | {"variant": f"tome 1.5x [{runtime}]"}
        found = page(document | {"rows": rows, "best": best}, tmp_path)
        assert f"--prune.runtime {runtime} --prune.schedule schedule.yaml" in found.text
    alone = [row | {"runtime": "torch.compile"} for row in document["rows"]]
    assert "--prune.runtime torch.compile --prune" in page(document | {"rows": alone, "best": BEST}, tmp_path).text


def test_missed_objective_is_the_heading(tmp_path: Path) -> None:
    found = page(comparison() | {"best": BEST | {"met": False}}, tmp_path)
    assert found.headings[1] == "No variant meets the objective"


def test_without_an_objective_the_page_says_how_to_choose(tmp_path: Path) -> None:
    found = page(comparison(), tmp_path)
    assert "Deploy this one" not in found.headings
    assert "--max-drop" in found.text.partition("Best at each speed-up")[0]


def test_rows_have_the_colours_of_the_plot(tmp_path: Path) -> None:
    document = comparison()
    document["rows"].insert(1, row("lazy 1.1x", method="lazy", latency_ms=500.0, top1=0.9))  # too slow to be drawn
    found = page(document, tmp_path)
    swatches = [each["style"] for tag, each in found.tags if (each.get("class") or "").startswith("swatch")]
    variants = {each["variant"] for each in document["rows"]}
    names = [cells[0] for cells in results(found) if cells[0] in variants]
    colors = {name: (style or "").removeprefix("color: ") for name, style in zip(names, swatches, strict=True)}
    drawn = {each.get_label(): each[0].get_color() for each in plot_pareto(document).axes[0].containers}
    assert len(drawn) > 8
    for variant, color in colors.items():
        line = variant.partition(" ")[0]
        assert color == drawn.get(line, color)
    assert len(set(colors.values())) > 8


def test_every_figure_names_its_column_where_rows_are_stacked(tmp_path: Path) -> None:
    """On a narrow screen the heading of a column is not shown, but the label of each figure."""
    found = page(comparison(), tmp_path)
    labels = [each["data-label"] for tag, each in found.tags if tag == "td" and "data-label" in each]
    columns = results(found)[0][1:]
    assert labels[-len(columns) :] == columns
    text = (tmp_path / "report.html").read_text()
    assert "content: attr(data-label)" in text.partition("(max-width: 640px)")[2]


def test_the_best_of_each_target_has_a_table_of_its_own(tmp_path: Path) -> None:
    rows = page(comparison(), tmp_path).rows
    assert rows[0] == ["target", "variant", "top-1", "change, points", "95% interval", "intervals that overlap"]
    assert [cells[:2] for cells in rows[1:5]] == [
        ["1.1x", "tome 1.1x"],
        ["1.25x", "tome 1.25x"],
        ["1.5x", "tome 1.5x"],
        ["2x", "pomt 2x"],
    ]
    assert rows[4][2:4] == ["88.80%", "\u22124.30"]
    assert rows[4][5] == "pomt+int8 2x, evit 2x"


@pytest.mark.parametrize(
    ("words", "entry"),
    [
        ("faster than dense", "int8 (0.90x)"),
        ("random", "vwt-intra 1.5x (84.90%, random 85.70%); vwt-intra 2x (73.40%, random 78.30%)"),
        ("reached", "tome 2x: at most 1.62x (it merges at most half of the tokens in each of 12 blocks)"),
    ],
)
def test_warnings_name_the_variants_with_their_figures(words: str, entry: str, tmp_path: Path) -> None:
    (item,) = [item for item in page(comparison(), tmp_path).items if entry in item]
    assert words in item.partition(":")[0]


def test_a_comparison_without_warnings_has_no_such_heading(tmp_path: Path) -> None:
    found = page({"rows": [row("dense"), pruned("tome", 1.5, 0.1)]}, tmp_path)
    assert "Warnings" not in found.headings


def test_runtimes_have_a_column_where_there_are_several(tmp_path: Path) -> None:
    document = comparison()
    assert "runtime" not in results(page(document, tmp_path))[0]
    first, *others = document["rows"]
    rows = results(
        page(document | {"rows": [first, *(each | {"runtime": "torch.compile"} for each in others)]}, tmp_path)
    )
    column = rows[0].index("runtime")
    found = {cells[0]: cells[column] for cells in rows[1:] if len(cells) > column}
    assert (found["dense"], found["tome 1.5x"]) == ("torch", "torch.compile")


@pytest.mark.parametrize(("width", "certain"), [(0.1, True), (1.0, False)])
def test_the_best_of_a_target_is_marked_where_its_interval_lies_above_the_others(
    width: float, certain: bool, tmp_path: Path
) -> None:
    document = comparison()
    for each in document["rows"]:
        for end in ("top1_low", "top1_high"):
            if each[end] is not None:
                each[end] = each["top1_change"] + width * (each[end] - each["top1_change"])
    write_page(document, tmp_path)
    text = (tmp_path / "report.html").read_text()
    best = [part.split("</th>")[0].split(">")[-1] for part in text.split('<tr class="best">')[1:]]
    assert best == (["tome 1.1x", "tome 1.25x", "tome 1.5x", "pomt 2x"] if certain else [])


def test_energy_has_a_column_where_it_was_measured(tmp_path: Path) -> None:
    assert not [name for name in results(page(comparison(), tmp_path))[0] if "J/image" in name]
    document = comparison()
    measured = document | {"rows": [each | {"joules_per_image": 1.5, "watts": 60.0} for each in document["rows"]]}
    rows = results(page(measured, tmp_path))
    assert rows[0][-1] == "J/image watts"
    assert rows[2][-1] == "1.500 60.0"


def test_schedules_can_be_copied(tmp_path: Path) -> None:
    write_page(comparison(), tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert text.count("<details>") == 31
    part = text.split("<b>pomt 1.5x</b>")[1]
    assert part.startswith(" removes 89 at block 3</summary>")
    shown = part.split("<pre>")[1].split("</pre>")[0]
    assert yaml.safe_load(shown) == comparison()["variants"]["pomt 1.5x"]["schedule"]
    assert "files in <code>schedules/</code>" not in text
    (tmp_path / "schedules").mkdir()
    assert "files in <code>schedules/</code>" in write_page(comparison(), tmp_path).read_text()


@pytest.mark.parametrize(
    "document",
    [
        planned(),
        without_accuracy(comparison()),
        without_accuracy(comparison(), "agreement"),
        {"rows": [row("dense")]},
        {"rows": [{"variant": "dense", "method": ""}]},
        comparison() | {"context": None, "variants": None, "unreached": None, "command": None, "started": None},
    ],
)
def test_a_page_for_every_kind_of_comparison(document: dict[str, Any], tmp_path: Path) -> None:
    found = page(document, tmp_path)
    assert "Results" in found.headings
    assert "None" not in found.text
    assert "nan" not in found.text


def test_words_about_the_change_follow_the_metric_that_is_used(tmp_path: Path) -> None:
    own = [row("dense", metric=0.4, metric_name="val/loss", top1=None)]
    own.append(row("pomt 2x", method="pomt", target_speedup=2.0, speedup=2.1, metric=0.5, metric_change=0.1, top1=None))
    found = page({"rows": [own[0], own[1] | {"metric_name": "val/loss"}]}, tmp_path)
    (best,) = (cells for cells in found.rows if cells[:2] == ["target", "variant"])
    assert best[2:4] == ["val/loss", "change"]
    assert "is the difference to dense in val/loss" in found.text
    assert "in points" not in found.text
    assert "change, points" in page(comparison(), tmp_path).text


def test_hostile_names_are_text(tmp_path: Path) -> None:
    bad = row(HOSTILE, method=HOSTILE, target_speedup=1.5, block=HOSTILE, note=HOSTILE, speedup=0.9)
    document = {
        "rows": [row("dense", device=HOSTILE), bad],
        "context": {"model": HOSTILE, HOSTILE: HOSTILE, "precision": HOSTILE},
        "command": HOSTILE,
        "started": HOSTILE,
        "energy": HOSTILE,
        "unreached": [{"method": HOSTILE, "target_speedup": 2.0, "best": 1.1, "reason": HOSTILE}],
        "variants": {HOSTILE: {"schedule": {HOSTILE: HOSTILE}, "method": HOSTILE, "settings": {HOSTILE: HOSTILE}}},
    }
    found = page(document, tmp_path)
    assert not [tag for tag, _ in found.tags if tag == "script"]
    assert found.text.count("<script>alert(1)</script>") >= 12
    assert found.headings[0].endswith(HOSTILE)


def test_a_row_that_could_not_be_run_keeps_its_place_and_its_note(tmp_path: Path) -> None:
    refused = row("shift", method="shift", latency_ms=None, speedup=None, top1=None, note="No MLP to look at.")
    found = page({"rows": [row("dense"), refused]}, tmp_path)
    line = next(each for each in results(found) if each[0] == "shift")
    assert line[1:4] == ["-", "-", "-"]  # top-1, speed-up and latency: nothing changed, so no column of changes
    assert "shift: No MLP to look at." in found.text


def test_no_rows_leave_an_old_page(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("old")
    with pytest.raises(DataError, match="'rows'"):
        write_page({"rows": []}, tmp_path)
    assert (tmp_path / "report.html").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_styles_for_phones_print_and_the_dark(tmp_path: Path) -> None:
    text = write_page(comparison(), tmp_path).read_text()
    for query in ("(max-width: 640px)", "@media print", "(prefers-color-scheme: dark)"):
        assert query in text
