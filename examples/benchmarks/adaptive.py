"""Do image-adaptive token counts at batch 1 win over the best static plan of the same mean latency?

There are two to four static graphs, each of another number of tokens, and a cheap score of the image chooses one
(`adaptive_graphs.py`). Graphs and thresholds are chosen on one half of the images, all combinations being tried, and
judged on the other half; then the other way round, so that every image is judged by a rule that has not seen it. The
best static plan of a mean latency is a random mix of two graphs, which knows nothing of the image, chosen on the same
half (`adaptive_rules.py`). Scores are

- of the pixels or of the first blocks of the dense model: variances, density of edges, similarity of patch tokens;
- the entropy of the output of the fastest graph: a cascade, in which further graphs run after it. `averaged` is the
  mean of its probabilities and those of the graph that runs after it, both being known; static plans may be the mean of
  two graphs as well;
- an oracle: whether the fastest graph agrees with the dense model, known at no cost, as an upper bound.

Rows with `score_cost` none have every score for nothing: if these do not win, no cheaper score helps. Buckets
`any` stands for the number that is best on the half on which rules are chosen, and the score `chosen` for the best
score there: the fair row, as among as many as there are some win by chance.

    python examples/benchmarks/adaptive.py --data cifar10/val --output results/adaptive
    python examples/benchmarks/adaptive.py --data cifar10/val --output results/adaptive --measure
    python examples/benchmarks/adaptive.py --data cifar10/val --output results/adaptive --latency latency.csv

`--measure` times all graphs and scores at batch 1 in one interleaved run, for which nothing else should run, and writes
latency.csv. Without it and without `--latency`, multiply-accumulates over those of the dense model stand in for
latency; `--fixed` adds a share that no graph saves. Outputs are kept in `--cache`, by weights and images.
"""

import argparse
from collections.abc import Iterable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from adaptive_graphs import (
    GRAPHS,
    Graph,
    Outputs,
    cost_of_score,
    entropy,
    evaluate,
    measured,
    relative_operations,
)
from adaptive_rules import Costs, Judged, Ranked, Rule, Static, best_rules, halves, pooled, resamples, static_front
from tables import Row, context_of, print_table, read_table, write_table
from torch import Tensor
from torch.utils.data import DataLoader, Subset

import lightning_prune as lp
from lightning_prune._utils.digests import weights_digest

CASCADE, AVERAGED, ORACLE, CHOSEN = "entropy, cascade", "entropy, cascade, averaged", "oracle", "chosen"
Array = np.ndarray[Any, Any]


class Candidate(NamedTuple):
    """A score with what rules by it cost.

    Attributes:
        values: (images,); images of higher values get slower graphs.
        costs: See `adaptive_rules.Costs`.
        right: (images, graphs): whether the answer is right where a graph was chosen.
        first: The graph of the lowest bucket, where the score is of that graph.
    """

    values: Array
    costs: Costs
    right: Array
    first: int | None = None


class Plans(NamedTuple):
    """Static plans: each graph, then the mean of each two.

    Attributes:
        right: (images, plans).
        latency: Of each, over that of the dense model.
        averaged: (images, graphs, graphs), whether the mean of two graphs is right; of a graph with itself, its own.
    """

    right: Array
    latency: list[float]
    averaged: Array


def static_plans(outputs: Outputs, labels: Array, latency: list[float]) -> Plans:
    """All of them, also those that are slower than the dense model."""
    shares = [torch.from_numpy(logits).softmax(dim=1).numpy() for logits in outputs.logits.values()]
    means = [[(first + second).argmax(axis=1) == labels for second in shares] for first in shares]
    averaged = np.array(means).transpose(2, 0, 1).astype(float)
    pairs = list(combinations(range(len(latency)), 2))
    right = [averaged[:, graph, graph] for graph in range(len(latency))] + [averaged[:, a, b] for a, b in pairs]
    return Plans(np.column_stack(right), [*latency, *(latency[a] + latency[b] for a, b in pairs)], averaged)


def candidates(
    outputs: Outputs, plans: Plans, graphs: dict[str, Graph], relative: dict[str, float], free: bool, seed: int
) -> Iterator[tuple[str, Candidate]]:
    """Each score, in both directions, and those of each graph that may be the fastest one."""
    names, kinds = list(graphs), list(graphs.values())
    latency, right = plans.latency, plans.right[:, : len(graphs)]
    for score, values in outputs.scores.items():

        def costs(chosen: tuple[int, ...], score: str = score) -> list[float]:
            more = 0.0 if free else cost_of_score(relative, score, [kinds[graph] for graph in chosen])
            return [latency[graph] + more for graph in chosen]

        for sign in (1, -1):
            yield score, Candidate(sign * values, costs, right)

    def plain(chosen: tuple[int, ...]) -> list[float]:
        return [latency[graph] for graph in chosen]

    def cascade(chosen: tuple[int, ...]) -> list[float]:
        start = latency[chosen[0]] + relative.get("entropy", 0.0)
        return [start, *(start + latency[graph] for graph in chosen[1:])]

    jitter = np.random.default_rng(seed).random(len(next(iter(outputs.logits.values()))))  # among equals at random
    dense = outputs.logits["exact"].argmax(axis=1)
    for place, name in enumerate(names):
        logits = outputs.logits[name]
        unsure = entropy(logits).numpy()
        yield CASCADE, Candidate(unsure, plain if free else cascade, right, place)
        if free:
            yield ORACLE, Candidate((logits.argmax(axis=1) != dense) + 0.5 * jitter, plain, right, place)
        else:
            yield AVERAGED, Candidate(unsure, cascade, plans.averaged[:, place], place)


class Found(NamedTuple):
    """The best rule of a score on the half on which it was chosen: the score, the rule, and its value there."""

    candidate: Candidate
    rule: Rule
    value: float


def choose(
    groups: Iterable[tuple[str, Candidate]], latency: list[float], half: Array, args: argparse.Namespace
) -> dict[tuple[str, int, int], Found]:
    """(score, buckets, place of the target) -> the best rule on these images."""
    found: dict[tuple[str, int, int], Found] = {}
    targets = [1 / speedup for speedup in args.speedups]
    for score, candidate in groups:
        ranked = Ranked(candidate.values[half], candidate.right[half], args.parts)
        for buckets in args.buckets if score != ORACLE else {2} & set(args.buckets):  # it knows two kinds of images
            rules = best_rules(ranked, latency, candidate.costs, buckets, targets, candidate.first)
            for place, best in enumerate(rules):
                key = (score, buckets, place)
                if best is not None and (key not in found or best[1] > found[key].value):
                    found[key] = Found(candidate, *best)
    return found


def judged_rules(
    outputs: Outputs,
    labels: Array,
    graphs: dict[str, Graph],
    relative: dict[str, float],
    parts: tuple[Array, Array],
    args: argparse.Namespace,
) -> dict[tuple[int, str, str, int], tuple[Judged, Rule]]:
    """(place of the target, score, its cost, buckets or 0 for any) -> the rule chosen on one part, on the other."""
    half, other = parts
    plans = static_plans(outputs, labels, [relative[name] for name in graphs])
    front = static_front(plans.right[half].mean(axis=0), plans.latency)
    static = Static(plans.right[other], front, plans.latency, resamples(len(other), args.resamples, args.seed))
    found: dict[tuple[int, str, str, int], Found] = {}
    for cost in ("counted", "none"):
        groups = candidates(outputs, plans, graphs, relative, cost == "none", args.seed)
        chosen = choose(groups, plans.latency[: len(graphs)], half, args)
        for (score, buckets, place), best in chosen.items():
            found[place, score, cost, buckets] = best
            for name in [score] if score == ORACLE else [score, CHOSEN]:  # of any number of buckets
                top = found.get((place, name, cost, 0))
                if top is None or best.value > top.value:
                    found[place, name, cost, 0] = best
    return {
        key: (static.judge(best.rule, best.candidate.values[other], best.candidate.right[other]), best.rule)
        for key, best in found.items()
    }


def compare(
    outputs: Outputs, labels: Array, graphs: dict[str, Graph], relative: dict[str, float], args: argparse.Namespace
) -> list[Row]:
    """A row for each speed-up, score and number of buckets, with the score's cost and without."""
    names = list(graphs)
    folds = [judged_rules(outputs, labels, graphs, relative, parts, args) for parts in halves(len(labels), args.seed)]
    rows = []
    for key in sorted(folds[0].keys() & folds[1].keys()):  # no rule may be fast enough on one half
        place, score, cost, buckets = key
        parts = [fold[key] for fold in folds]
        outcome, rule = parts[0]
        both, half_only = pooled([part for part, _ in parts]), pooled([outcome])
        rows.append(
            {
                "speedup": args.speedups[place],
                "score": score,
                "score_cost": cost,
                "buckets": buckets or "any",
                "difference": round(both[0], 4),
                "low": round(both[1], 4),
                "high": round(both[2], 4),
                "one_half": round(half_only[0], 4),
                "one_half_low": round(half_only[1], 4),
                "one_half_high": round(half_only[2], 4),
                "adaptive_top1": round(float(np.mean([part.adaptive for part, _ in parts])), 4),
                "static_top1": round(float(np.mean([part.static for part, _ in parts])), 4),
                "reached": round(1 / float(np.mean([part.latency for part, _ in parts])), 3),
                "slowest_image": round(max(rule.costs), 3),
                "graphs": "; ".join(names[graph] for graph in rule.graphs),
            }
        )
    return rows


def static_rows(outputs: Outputs, labels: Array, relative: dict[str, float]) -> list[Row]:
    """A row for each graph."""
    dense = outputs.logits["exact"].argmax(axis=1)
    return [
        {
            "graph": name,
            "latency": round(relative[name], 4),
            "speedup": round(1 / relative[name], 3),
            "top1": round(float((logits.argmax(axis=1) == labels).mean()), 4),
            "agreement": round(float((logits.argmax(axis=1) == dense).mean()), 4),
        }
        for name, logits in outputs.logits.items()
    ]


def load(args: argparse.Namespace) -> tuple[torch.nn.Module, Tensor, Array]:
    """The model, (images, C, H, W), and their labels."""
    module = lp.ImageClassifier(args.model, pretrained=False, weights=args.weights).eval()
    data = lp.ImageFolderData(args.data, data_config=module.data_config)
    data.setup("predict")
    some = np.random.default_rng(args.seed).permutation(len(data.dataset))[: args.images]
    parts = list(DataLoader(Subset(data.dataset, sorted(some.tolist())), batch_size=args.batch_size))
    return module.model, torch.cat([images for images, _ in parts]), torch.cat([each for _, each in parts]).numpy()


def latencies(
    model: torch.nn.Module, image: Tensor, graphs: dict[str, Graph], args: argparse.Namespace
) -> tuple[dict[str, float], str]:
    """Graph or score -> latency over that of the dense model, and what that is."""
    path = args.latency
    if args.measure:
        timed = measured(model, image, graphs, args.rounds, args.seconds, args.clock)
        rows: list[Row] = [
            {"name": name, "ms": round(ms, 4), "relative": round(ratio, 5), "error": round(error, 5)}
            for name, (ms, ratio, error) in timed.items()
        ]
        path = args.output / "latency.csv"
        write_table(path, rows, context_of("cpu"))
    if path is None:
        what = "relative operations" + (f", {args.fixed} of them fixed" if args.fixed else "")
        return relative_operations(model, image, graphs, args.fixed), what
    return {row["name"]: float(row["relative"]) for row in read_table(path)}, "measured at batch 1"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with one subfolder a class, of held-out images")
    parser.add_argument("--model", default="vit_cifar_patch4_56")
    parser.add_argument("--weights", default="examples/weights/vit_cifar_patch4_56.safetensors")
    parser.add_argument("--graphs", nargs="+", default=list(GRAPHS), choices=list(GRAPHS), help="`exact` always is one")
    parser.add_argument("--speedups", type=float, nargs="+", default=[1.1, 1.25, 1.5, 2.0])
    parser.add_argument("--buckets", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--parts", type=int, default=40, help="number of equal parts between which thresholds lie")
    parser.add_argument("--images", type=int, default=None, help="number of images taken at random; all if not given")
    parser.add_argument("--batch-size", type=int, default=50, help="for the outputs, which do not depend on it")
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="of the halves, resamples and the oracle's ties")
    parser.add_argument("--latency", type=Path, default=None, help="latency.csv of an earlier run with --measure")
    parser.add_argument("--measure", action="store_true", help="time graphs and scores at batch 1, now")
    parser.add_argument("--rounds", type=int, default=301)
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"])
    parser.add_argument("--fixed", type=float, default=0.0, help="share of the dense latency that no graph saves")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cache", type=Path, default=None, help="folder; by default `cache` in that of --output")
    parser.add_argument("--output", type=Path, required=True, help="folder")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, images, labels = load(args)
    graphs = {name: graph for name, graph in GRAPHS.items() if name in (*args.graphs, "exact")}
    relative, what = latencies(model, images[:1], graphs, args)
    outputs = evaluate(model, images, graphs, args.batch_size, args.cache or args.output / "cache")
    context = {**context_of("cpu"), "latency": what, "images": str(len(images)), "weights": weights_digest(model)}
    static = static_rows(outputs, labels, relative)
    write_table(args.output / "graphs.csv", static, context)
    print_table(f"Graphs ({what})", static)
    rows = compare(outputs, labels, graphs, relative, args)
    if not rows:
        raise SystemExit("No rule attains any of the speed-ups on both halves.")
    write_table(args.output / "adaptive.csv", rows, context)
    shown = ("speedup", "score", "score_cost", "difference", "low", "high", "reached", "slowest_image")
    print_table(f"Adaptive minus static, top-1 ({what})", [row for row in rows if row["buckets"] == "any"], *shown)


if __name__ == "__main__":
    main()
