"""The Python of README.md and of docs/ runs as it stands, and does what the text says."""

import ast
import dataclasses
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from timm.models.vision_transformer import Block
from torch import Tensor, nn

import lightning_prune as lp
from helpers import ROOT
from helpers.fresh import run_ranks
from lightning_prune.callbacks import TokenPruning
from lightning_prune.patching.class_swap import is_patched_module

Names = dict[str, Any]
PAGES = {
    str(page.relative_to(ROOT)): [
        (title, block)
        for title, block in re.findall(
            r'^```python(?: title="([^"]*)")?\n(.*?)^```', page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
        )
    ]
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
NOT_RUN = {  # part of a block -> why it is only compiled
    "hf:openai/clip-vit-base-patch16": "downloads weights; examples/clip_digits.py does the same and is run",
    "LightningCLI(": "a program; a LightningCLI with the overlay is run in tests/cli",
    'strategy="ddp"': "a program for two processes, see test_two_processes",
    "timings = lp.compare_latency(": "the benchmark of int8, which takes minutes",
    "CIFAR10(": "downloads the dataset",
}
GIVEN = {  # page -> what its text says that the reader has
    "docs/operators.md": "import timm\nmodel = timm.create_model('vit_tiny_patch16_224', depth=2, img_size=64)\n"
    "import torch\nimages = torch.randn(1, 3, 64, 64)\nschedule = [3, 2]\n"
}


def validates(names: Names, tokens: list[int]) -> None:
    metrics = names["trainer"].callback_metrics
    figures = {"latency_ms", "dense_latency_ms", "speedup", "tokens", "removed"}
    assert {f"pruning/{figure}" for figure in figures} <= metrics.keys()
    decision = names["callback"].decision
    assert metrics["pruning/tokens"] == 197 - metrics["pruning/removed"] == decision.tokens == tokens[-1]
    assert {name: float(metrics[name]) for name in decision.metrics()} == pytest.approx(decision.metrics())
    assert decision.dense_tokens == 197
    assert TokenPruning().decision is None
    text = (ROOT / "docs/how-to/own-module.md").read_text(encoding="utf-8")
    (described,) = re.findall(r"It has (`schedule`.*?)\. `use", text, flags=re.DOTALL)
    assert set(re.findall(r"`(\w+)`", described)) <= {field.name for field in dataclasses.fields(decision)}


def starts(names: Names, tokens: list[int]) -> None:
    validates(names, tokens)
    decision = names["decision"]
    assert decision.schedule == decision.plan.schedule == lp.Schedule.load("schedule.yaml")


def of_readme(names: Names, tokens: list[int]) -> None:
    assert tokens[-1] == 101
    assert names["logits"].shape == (1, 1000)
    validates(names, tokens[:-1])


def plans(names: Names, tokens: list[int]) -> None:
    plan = names["plan"]
    assert plan.profile is names["profile"]
    assert lp.Schedule.load("schedule.yaml").removed == plan.schedule.removed
    assert plan.schedule.total_removed == plan.total_removed == 197 - plan.tokens
    assert Path("plan.png").read_bytes().startswith(b"\x89PNG")
    assert names["callback"].decision.dense_tokens == 197


def of_own_module(names: Names, tokens: list[int]) -> None:
    assert names["callback"].decision.dense_tokens == 37
    dense, *others = names["results"].rows
    assert dense.metric == pytest.approx(float(names["trainer"].callback_metrics["val/accuracy"]), abs=1)
    assert all(row.method == "tome" and row.metric_change is not None for row in others)


def of_hugging_face(names: Names, tokens: list[int]) -> None:
    assert names["logits"].shape == (1, 2)


def compares(names: Names, tokens: list[int]) -> None:
    rows = names["results"].rows
    assert rows[0].variant == "dense"
    assert {row.method for row in rows[1:]} <= {"tome", "random", "resize"}
    assert (Path("results") / "methods" / "report.html").exists()


def deploys(names: Names, tokens: list[int]) -> None:
    assert tokens[:3] == [197 - 56, 1 + 138, 1 + 140]
    assert names["logits"].shape == (1, 1000)
    assert not names["handle"].active
    assert not any(map(is_patched_module, names["model"].modules()))
    assert names["report"].max_relative_error < 1e-3
    assert names["exported"](names["images"][:1]).shape == (1, 10)


def bundles(names: Names, tokens: list[int]) -> None:
    assert names["made"].methods == ("tome",)
    assert (Path("bundle") / "profile.py").exists()


def gives_back(names: Names, tokens: list[int]) -> None:
    assert [tuple(tap.shape) for tap in names["taps"]] == [(2, 96, 14, 14)] * 4
    assert names["plan"].profile.dense_tokens == 197
    assert names["callback"].config.restore == "auto"


def of_words(names: Names, tokens: list[int]) -> None:
    assert len(names["vocabulary"]) == 50
    assert names["logits"].shape == (16, 1000)


def of_energy(names: Names, tokens: list[int]) -> None:
    assert names["counter"] is not None


def extends(names: Names, tokens: list[int]) -> None:
    assert names["logits"].shape == (2, 1000)
    assert names["profile"].dense_tokens == 197
    assert names["profile"].context["runtime"] == "graph"
    assert names["Graph"](threads=2).name == "graph:threads=2"


def names_methods(names: Names, tokens: list[int]) -> None:
    assert not names["handle"].active
    assert not any(map(is_patched_module, names["model"].modules()))


def simulates(names: Names, tokens: list[int]) -> None:
    assert names["profile"].cliffs()
    assert Path("simulated_profile.png").read_bytes().startswith(b"\x89PNG")


def writes_graphs(names: Names, tokens: list[int]) -> None:
    assert "TopK" not in {node.op_type for node in names["program"].model_proto.graph.node}


CHECKS: dict[str, Callable[[Names, list[int]], None]] = {
    "README.md": of_readme,
    "docs/get-started.md": starts,
    "docs/how-to/latency-budget.md": plans,
    "docs/how-to/own-module.md": of_own_module,
    "docs/how-to/huggingface-clip.md": of_hugging_face,
    "docs/how-to/compare.md": compares,
    "docs/how-to/deploy.md": deploys,
    "docs/how-to/other-device.md": bundles,
    "docs/how-to/dense-heads.md": gives_back,
    "docs/how-to/visual-words.md": of_words,
    "docs/how-to/energy.md": of_energy,
    "docs/how-to/extend.md": extends,
    "docs/methods.md": names_methods,
    "docs/operators.md": writes_graphs,
    "docs/schedule.md": simulates,
}
SHORT = {  # the others start trainers, or convert models
    "docs/how-to/energy.md",
    "docs/how-to/huggingface-clip.md",
    "docs/how-to/visual-words.md",
    "docs/methods.md",
    "docs/schedule.md",
}


def is_run(block: str) -> bool:
    return not any(part in block for part in NOT_RUN)


@pytest.fixture
def tokens() -> Iterator[list[int]]:
    """How many left each block of timm, in each forward pass; hooks are not called while a model is measured."""
    seen: list[int] = []

    def record(module: nn.Module, args: Any, output: Tensor) -> None:
        if isinstance(module, Block):
            seen.append(output.shape[1])

    hook = nn.modules.module.register_module_forward_hook(record)
    yield seen
    hook.remove()


def shorter(function: Callable[..., Any], *args: Any, time_limit: float, **kwargs: Any) -> Any:
    return function(*args, time_limit=time_limit / 5, **kwargs)


@pytest.mark.parametrize(
    "page", [page if page in SHORT else pytest.param(page, marks=pytest.mark.long) for page in CHECKS]
)
def test_runs(page: str, tokens: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block after block in an empty folder, on a few batches: a reader's own run only takes longer."""
    monkeypatch.chdir(tmp_path)
    few = {
        L.Trainer: {"logger": False, "limit_val_batches": 2, "enable_progress_bar": False},
        TokenPruning: {"time_limit": 1, "calibration": 16},
    }
    for kind, defaults in few.items():

        def quick(self: Any, *args: Any, _init: Any = kind.__init__, _defaults: Any = defaults, **kwargs: Any) -> None:
            _init(self, *args, **{**_defaults, **kwargs})

        monkeypatch.setattr(kind, "__init__", quick)
    for name in ("profile_latency", "plan"):
        monkeypatch.setattr(lp, name, partial(shorter, getattr(lp, name)))
    names: Names = {"__name__": "page"}
    exec(GIVEN.get(page, ""), names)
    for _, block in PAGES[page]:
        if is_run(block):
            exec(compile(block, page, "exec"), names)
    CHECKS[page](names, tokens[11::12])


def test_every_page_with_python_has_a_check() -> None:
    assert {page for page, blocks in PAGES.items() if any(is_run(block) for _, block in blocks)} == {*CHECKS}


def test_what_is_not_run_compiles() -> None:
    left = [block for blocks in PAGES.values() for _, block in blocks if not is_run(block)]
    assert len(left) == len(NOT_RUN)
    for block in left:
        imported = {
            f"{node.module}.{alias.name}"
            for node in ast.walk(ast.parse(block))
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lightning_prune")
            for alias in node.names
        }
        used = set(re.findall(r"\blp\.(\w+)", block))
        assert used <= {*lp.__all__}
        assert all(
            hasattr(__import__(name.rpartition(".")[0], fromlist=["_"]), name.rpartition(".")[2]) for name in imported
        )


@pytest.mark.long
def test_two_processes(tmp_path: Path) -> None:
    (block,) = [block for title, block in PAGES["docs/how-to/many-gpus.md"] if title == "evaluate.py"]
    few = block.replace("strategy=", "limit_val_batches=2, logger=False, strategy=").replace(
        "schedule=56", "schedule=56, time_limit=1"
    )
    (tmp_path / "evaluate.py").write_text(few)
    first, second = run_ranks(tmp_path / "evaluate.py", folder=tmp_path)
    assert (first.returncode, second.returncode) == (0, 0), (first.stderr, second.stderr)
    assert [run.stdout.count("Token pruning") for run in (first, second)] == [1, 0]  # rank 0 alone tells
