"""The benchmark of image-adaptive counts: its rules against enumeration, its statistics, its scores, and a run."""

import sys
from argparse import Namespace
from itertools import combinations
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import lightning_prune as lp
from helpers import ROOT

ROWS = {  # of the table in the docs -> score, and whether its cost is counted
    "variance of pixels in a patch": ("pixel variance", "counted"),
    "density of edges": ("edge density", "counted"),
    "variance of the embedded patches": ("embedding variance", "counted"),
    "similarity of tokens after block 0": ("merge similarity, block 0", "counted"),
    "similarity of tokens after block 1": ("merge similarity, block 1", "counted"),
    "cascade": ("entropy, cascade", "counted"),
    "cascade, outputs averaged": ("entropy, cascade, averaged", "counted"),
    "the best of these on the first half": ("chosen", "counted"),
    "cascade, if its score cost nothing": ("entropy, cascade", "none"),
    "whether the faster of two graphs agrees with dense, at no cost": ("oracle", "none"),
}
LATENCY = [0.3, 0.55, 0.7, 1.0]


@pytest.fixture
def rules(program: Any) -> Any:
    return program("adaptive_rules")


@pytest.fixture
def graphs(program: Any) -> Any:
    return program("adaptive_graphs")


@pytest.mark.parametrize("buckets", [2, 3])
@pytest.mark.parametrize("first", [None, 1])
@pytest.mark.parametrize("seed", [0, 1])
def test_best_rules_are_those_of_enumeration(rules: Any, buckets: int, first: int | None, seed: int) -> None:
    rng = np.random.default_rng(seed)
    score, values = rng.random(24), (rng.random((24, 4)) < 0.6).astype(float)
    latency = [LATENCY[place] for place in rng.permutation(4)]

    def costs(chosen: tuple[int, ...]) -> list[float]:
        return [latency[graph] + 0.05 * (place > 0) for place, graph in enumerate(chosen)]

    targets = [0.2, 0.5, 0.75]
    found = rules.best_rules(rules.Ranked(score, values, 6), latency, costs, buckets, targets, first)
    assert found[0] is None  # no graph is as fast
    order = sorted(range(24), key=lambda image: score[image])
    for target, best in zip(targets[1:], found[1:], strict=True):
        highest = -1.0
        for chosen in combinations(sorted(range(4), key=lambda graph: latency[graph]), buckets):
            if first is not None and chosen[0] != first:
                continue
            for ends in combinations(range(4, 24, 4), buckets - 1):
                bucket = [sum(place >= end for end in ends) for place in range(24)]
                if sum(costs(chosen)[each] for each in bucket) / 24 <= target + 1e-9:
                    right = [values[image, chosen[each]] for image, each in zip(order, bucket, strict=True)]
                    highest = max(highest, sum(right) / 24)
        if highest < 0:
            assert best is None
            continue
        rule, value = best
        right, took = rule.applied(score, values)
        assert value == pytest.approx(highest) == pytest.approx(right.mean())
        assert took.mean() <= target + 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_the_static_mix_is_the_best_of_two_graphs(rules: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    means = rng.random(4)
    front = rules.static_front(means, LATENCY)
    for target in np.linspace(0.3, 1.2, 10):
        best = max(
            share * means[a] + (1 - share) * means[b]
            for a in range(4)
            for b in range(4)
            for share in np.linspace(0, 1, 2001)
            if share * LATENCY[a] + (1 - share) * LATENCY[b] <= target + 1e-9
        )
        (found,) = rules.static_mix(front, LATENCY, means[None], np.array([target]))
        assert found == pytest.approx(best, abs=1e-3)


def synthetic(seed: int, images: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """Difficulty of each image, and whether two graphs are right: the fast one up to a difficulty of 0.7."""
    difficulty = np.random.default_rng(seed).random(images)
    return difficulty, np.column_stack([difficulty < 0.7, difficulty < 0.95]).astype(float)


def test_a_score_that_knows_wins_and_one_that_does_not_does_not(rules: Any) -> None:
    difficulty, values = synthetic(0)
    draws, latency = rules.resamples(4000, 400, 0), [0.5, 1.0]
    static = rules.Static(values, rules.static_front(values.mean(axis=0), latency), latency, draws)
    rule = rules.Rule((0, 1), (0.8,), (0.5, 1.0))  # the slow graph for a fifth of the images
    knows = static.judge(rule, difficulty, values)
    assert knows.latency == pytest.approx(0.6, abs=0.01)
    assert (knows.adaptive, knows.static) == (pytest.approx(0.85, abs=0.02), pytest.approx(0.75, abs=0.02))
    difference, low, high = rules.pooled([knows, knows])
    assert 0.07 < low < difference < high < 0.13
    blind = static.judge(rule, np.random.default_rng(1).random(4000), values)
    _, low, high = rules.pooled([blind])
    assert low < 0 < high


def test_the_interval_is_that_of_the_linearised_difference(rules: Any) -> None:
    """For a mean of what each image contributes, where the mix follows the mean latency of the rule."""
    difficulty, values = synthetic(2)
    score = difficulty + np.random.default_rng(3).normal(0, 0.2, 4000)
    rule, latency, front = rules.Rule((0, 1), (0.7,), (0.52, 1.02)), [0.5, 1.0], [0, 1]
    judged = rules.Static(values, front, latency, rules.resamples(4000, 1000, 1)).judge(rule, score, values)
    right, took = rule.applied(score, values)
    slow = (took.mean() - 0.5) / 0.5
    slope = (values[:, 1].mean() - values[:, 0].mean()) / 0.5
    each = right - (1 - slow) * values[:, 0] - slow * values[:, 1] - slope * took
    _, low, high = rules.pooled([judged])
    assert high - low == pytest.approx(2 * 1.96 * each.std() / 4000**0.5, rel=0.12)


def test_rules_do_not_see_the_images_that_they_are_judged_on(program: Any, rules: Any) -> None:
    adaptive, graphs = program("adaptive"), program("adaptive_graphs")
    rng = np.random.default_rng(0)
    (first, second), (third, fourth) = rules.halves(61, 5)
    assert sorted([*first, *second]) == list(range(61))
    assert (first.tolist(), second.tolist()) == (fourth.tolist(), third.tolist())
    used = {name: graphs.GRAPHS[name] for name in ("exact", "resize, 64", "tome, 23")}
    relative = {**dict(zip(used, (0.95, 0.3, 0.5), strict=True)), "edge density": 0.1, "edge density, alone": 0.1}
    args = Namespace(speedups=[1.5], buckets=[2, 3], parts=6, seed=0, resamples=20)
    logits = {name: rng.normal(size=(61, 3)) for name in used}
    outputs = graphs.Outputs(logits, {"edge density": rng.random(61)})
    labels = rng.integers(3, size=61)
    chosen = adaptive.judged_rules(outputs, labels, used, relative, (first, second), args)
    labels[second] = rng.integers(3, size=len(second))
    again = adaptive.judged_rules(outputs, labels, used, relative, (first, second), args)
    assert {key: rule for key, (_, rule) in chosen.items()} == {key: rule for key, (_, rule) in again.items()}
    cascades = {"entropy, cascade", "entropy, cascade, averaged"}
    assert {score for _, score, _, _ in chosen} == {"edge density", "oracle", "chosen"} | cascades
    rule = chosen[0, "entropy, cascade", "counted", 2][1]
    at = [list(relative.values())[graph] for graph in rule.graphs]
    assert rule.costs == pytest.approx((at[0], at[0] + at[1]))  # the second graph runs after the first
    rule = chosen[0, "edge density", "counted", 2][1]
    assert rule.costs == pytest.approx([0.1 + list(relative.values())[graph] for graph in rule.graphs])


def test_static_plans_are_graphs_and_means_of_two(program: Any) -> None:
    logits = np.random.default_rng(0).normal(size=(3, 50, 4)).astype(np.float32)
    labels = np.random.default_rng(1).integers(4, size=50)
    outputs = program("adaptive_graphs").Outputs(dict(zip("abc", logits, strict=True)), {})
    plans = program("adaptive").static_plans(outputs, labels, [0.5, 0.2, 1.0])
    assert plans.latency == pytest.approx([0.5, 0.2, 1.0, 0.7, 1.5, 1.2])
    shares = np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)
    for plan, used in enumerate([(0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2)]):
        right = (shares[list(used)].mean(axis=0).argmax(axis=1) == labels).astype(float)
        assert np.array_equal(plans.right[:, plan], right)
        assert np.array_equal(plans.averaged[:, used[1], used[0]], right)


def test_scores(graphs: Any) -> None:
    tokens = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    similar = [
        sum(
            max(float(torch.cosine_similarity(image[i], image[j], dim=0)) for j in range(5) if j != i) for i in range(5)
        )
        / 5
        for image in tokens
    ]
    assert graphs.merge_similarity(tokens).tolist() == pytest.approx(similar)
    assert graphs.embedding_variance(tokens).tolist() == pytest.approx(tokens.numpy().var(axis=1).mean(axis=1).tolist())
    images = torch.zeros(2, 3, 5, 5)
    images[1, 2, :, 2:] = 1.0  # an edge in one of the four columns that have a right neighbour
    assert graphs.edge_density(images).tolist() == [0, 0.25]
    assert graphs.entropy(np.log([[0.5, 0.25, 0.25], [1, 1, 1]])).tolist() == pytest.approx([1.5 * log(2), log(3)])


def test_scores_share_the_blocks_that_all_graphs_begin_with(graphs: Any) -> None:
    late, early, resized = (graphs.GRAPHS[name] for name in ("pomt-nearest, 127", "tome, 87", "resize, 64"))
    relative = dict.fromkeys(graphs.SCORES, 0.2) | {f"{name}, alone": 0.01 for name in graphs.SCORES}
    exact = graphs.GRAPHS["exact"]
    assert graphs.cost_of_score(relative, "merge similarity, block 1", [late, exact]) == 0.01
    assert graphs.cost_of_score(relative, "merge similarity, block 1", [late, early]) == 0.2
    assert graphs.cost_of_score(relative, "embedding variance", [late, early]) == 0.01
    assert graphs.cost_of_score(relative, "embedding variance", [exact, resized]) == 0.2
    assert graphs.cost_of_score(relative, "edge density", [exact, resized]) == 0.01


def test_a_run(program: Any, graphs: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    adaptive, rng = program("adaptive"), np.random.default_rng(0)
    for label in range(2):
        (tmp_path / "data" / str(label)).mkdir(parents=True)
        for number in range(6):
            pixels = rng.integers(0, 256, (56, 56, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / str(label) / f"{number}.png")
    torch.manual_seed(0)
    model = timm.create_model("vit_cifar_patch4_56").eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    words = ["adaptive.py", "--data", str(tmp_path / "data"), "--weights", str(tmp_path / "weights.safetensors")]
    words += ["--graphs", "tome, 23", "--parts", "3", "--buckets", "2", "--resamples", "20", "--threads", "1"]
    words += ["--speedups", "1.05", "--cache", str(tmp_path / "cache"), "--latency", str(tmp_path / "latency.csv")]
    names = ["exact", "tome, 23", *(name + more for name in graphs.SCORES for more in ("", ", alone")), "entropy"]
    relative = [0.9 if name == "exact" else 0.4 if name == "tome, 23" else 0.01 for name in names]
    table = [{"name": name, "relative": value} for name, value in zip(names, relative, strict=True)]
    adaptive.write_table(tmp_path / "latency.csv", table, {})
    monkeypatch.setattr(sys, "argv", [*words, "--output", str(tmp_path / "first")])
    adaptive.main()
    kept = set((tmp_path / "cache").iterdir())
    assert len(kept) == 2 + 5
    monkeypatch.setattr(type(model), "forward", None)  # nothing runs again
    monkeypatch.setattr(sys, "argv", [*words, "--output", str(tmp_path / "second")])
    adaptive.main()
    assert set((tmp_path / "cache").iterdir()) == kept
    first, second = (adaptive.read_table(tmp_path / name / "adaptive.csv") for name in ("first", "second"))
    assert first == second
    assert {"chosen", "oracle", "edge density"} <= {row["score"] for row in first}
    assert {row["graphs"] for row in first} == {"tome, 23; exact"}


def test_all_are_measured(graphs: Any) -> None:
    model = timm.create_model("vit_cifar_patch4_56", depth=3).eval()
    used = {"exact": graphs.GRAPHS["exact"], "late": graphs.Graph("topk", {1: 90})}
    timed = graphs.measured(model, torch.randn(1, 3, 56, 56), used, rounds=2, seconds=1)
    assert timed.keys() >= {"dense", "exact", "late", "edge density", "edge density, alone", "entropy"}
    assert timed["dense"][1] == 1
    assert timed["edge density"][1] < timed["merge similarity, block 1"][1]


def test_outputs_are_of_the_patched_model(graphs: Any) -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_cifar_patch4_56").eval()
    images = torch.randn(3, 3, 56, 56)
    used = {name: graphs.GRAPHS[name] for name in ("resize, 100", "tome, 23")}
    outputs = graphs.evaluate(model, images, used, batch=2)
    with torch.no_grad():
        assert torch.allclose(model.norm(graphs.entering(model, images, 12)), model.forward_features(images))
        for name, removed in {"resize, 100": {0: 96}, "tome, 23": {0: 69, 1: 48, 2: 36, 5: 20}}.items():
            with lp.patch(model, name.split(",")[0], lp.Schedule([removed.get(block, 0) for block in range(12)])):
                assert np.allclose(outputs.logits[name], model(images), atol=1e-5)
    relative = graphs.relative_operations(model, images[:1], used)
    half = graphs.relative_operations(model, images[:1], used, fixed=0.5)
    assert 0.1 < relative["tome, 23"] < relative["resize, 100"] < 0.6
    assert half["tome, 23"] == pytest.approx(0.5 + 0.5 * relative["tome, 23"])
    assert relative["merge similarity, block 1, alone"] < 0.02 < relative["merge similarity, block 1"] < 0.25


def test_the_table_in_the_docs_has_the_figures_of_the_file(program: Any) -> None:
    rows = program("tables").read_table(ROOT / "examples" / "results" / "adaptive" / "adaptive.csv")
    found = {(row["score"], row["score_cost"], float(row["speedup"])): row for row in rows if row["buckets"] == "any"}
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8").replace("\u2212", "-")
    section = text.split("## Image-adaptive counts\n")[1].split("\n## ")[0]
    lines = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("| ")]
    head, *body = [[cell.strip() for cell in line] for line in lines]
    assert [row[0] for row in body] == list(ROWS)
    for name, *cells in body:
        for target, cell in zip(head[1:], cells, strict=True):
            row = found[*ROWS[name], float(target.removesuffix("x"))]
            change, low, high = (f"{100 * float(row[column]):+.1f}" for column in ("difference", "low", "high"))
            assert cell == f"{change} ({low} to {high})", (name, target)
