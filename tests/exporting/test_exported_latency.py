"""Which form of the graph is taken: the faster one, or the one that the runtime accepts."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lightning_prune as lp
from helpers.data import noise_images
from helpers.models import tiny_vit
from lightning_prune.exporting import exported_latency
from lightning_prune.exporting.export_report import ExportReport, GraphChoice
from lightning_prune.exporting.exported_latency import faster_graph

IMAGES = noise_images(2)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model whose graph is nothing but the name of its form."""
    monkeypatch.setattr(exported_latency, "graph_of", lambda model, images, batch, form: form)
    return None


def format_of(seconds: dict[str, float | None]) -> Any:
    """A format in whose runtime the forms take these times; None is refused."""

    def load(form: str) -> Any:
        taken = seconds[form]
        if taken is None:
            raise lp.ExportError(f"no {form} graph here")

        def run(images: torch.Tensor) -> list[torch.Tensor]:
            time.sleep(taken)
            return []

        return run

    return SimpleNamespace(load_graph=load)


@pytest.mark.parametrize(("native", "portable", "taken"), [(0.001, 0.02, "native"), (0.02, 0.001, "portable")])
def test_the_faster_one_is_taken(model: Any, native: float, portable: float, taken: str) -> None:
    choice = faster_graph(model, IMAGES, format_of({"native": native, "portable": portable}), 5, None)
    assert choice.form == taken
    assert choice.native_ms is not None
    assert choice.portable_ms is not None
    assert (choice.native_ms >= 1e3 * native, choice.portable_ms >= 1e3 * portable) == (True, True)
    assert (choice.portable_ms < choice.native_ms) == (taken == "portable")
    assert "takes" in choice.reason


@pytest.mark.parametrize(("refused", "taken"), [("native", "portable"), ("portable", "native")])
def test_the_one_that_is_accepted_is_taken(model: Any, refused: str, taken: str) -> None:
    choice = faster_graph(model, IMAGES, format_of({refused: None, taken: 0.001}), 2, None)
    assert choice.form == taken
    assert getattr(choice, f"{refused}_ms") is None
    assert getattr(choice, f"{taken}_ms") > 0
    assert choice.reason == f"the {refused} one is not accepted: no {refused} graph here"


def test_none_is_accepted(model: Any) -> None:
    with pytest.raises(lp.ExportError, match="no native graph here"):
        faster_graph(model, IMAGES, format_of({"native": None, "portable": None}), 2, None)


def test_the_report_says_both_times(tmp_path: Any) -> None:
    plan = lp.Schedule([4, 0], "topk")
    options: dict[str, Any] = {"format": "torch-export", "graph": "auto", "rounds": 3}
    report = lp.export(tiny_vit(depth=2, embed_dim=24), tmp_path / "out", IMAGES, plan=plan, **options)
    choice = report.graph_choice
    assert isinstance(choice, GraphChoice)
    assert report.graph == choice.form
    assert ExportReport.read(tmp_path / "out").graph_choice == choice
    text = (tmp_path / "out" / "README.md").read_text()
    assert (
        f"Graph: {choice.form}, chosen of native {choice.native_ms:.2f} ms, portable {choice.portable_ms:.2f} ms"
        in text
    )
    refused = any("topk" in name for name in report.operators)
    assert refused == (choice.form == "native")
