"""Latency of a dense reader over long sequences, in PyTorch and in runtimes: all methods at the same cuts.

    python examples/benchmarks/dense_latency.py --output examples/results/dense
    python examples/benchmarks/dense_latency.py --sizes 518 --modes openvino --shares 0.25 --output results/dense

The model returns the grids of four blocks (`DenseFeatures`). A share of its patches is removed in each of three
blocks, at a third, a half and two thirds of the depth, and given back at the blocks that are read (`restore="auto"`).
Weights are random: the counts are given, so that latencies do not depend on them. What such a schedule costs in
similarity, and which one a plan would choose, `dense.py` says, of trained weights.
"""

import argparse
import copy
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from dense import METHODS, build
from tables import Row, context_of, print_table, write_table
from torch import Tensor

import lightning_prune as lp
from lightning_prune.classification import DenseFeatures
from lightning_prune.profiling import InterleavedTimer, between_runs
from lightning_prune.profiling.clocks import read_clock
from lightning_prune.profiling.interleaved_timer import OWN_MEMORY
from lightning_prune.runtimes import parse_runtime

FEWEST = 3  # rounds, even where they take longer than `--seconds`


def schedule_of(depth: int, patches: int, share: float) -> lp.Schedule:
    """The cuts: that share of the patches in each of three blocks."""
    blocks = {depth // 3, depth // 2, 2 * depth // 3}
    return lp.Schedule([round(share * patches) if block in blocks else 0 for block in range(depth)])


def contenders(
    model: DenseFeatures, images: Tensor, methods: list[str], schedule: lp.Schedule, mode: str
) -> dict[str, Callable[[Tensor], Any]]:
    """Dense, and the model pruned by each method, on the same weights; each converted in a runtime."""
    weights = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    found = {"dense": model}
    for method in methods:
        found[method] = copy.deepcopy(model, dict(weights))
        lp.patch(found[method], method, schedule, restore="auto")
    if mode == "eager":
        return {**found}
    runtime = parse_runtime(mode)
    return {name: runtime.prepare(module, images) for name, module in found.items()}


def measure(
    forwards: dict[str, Callable[[Tensor], Any]], images: Tensor, mode: str, args: argparse.Namespace
) -> list[Row]:
    """A row for each method: its latency over that of dense, the median over rounds, and the spread."""
    current = ["dense"]

    def switch(variant: str) -> None:
        current[0] = variant

    def run() -> Any:
        return forwards[current[0]](images)

    clock, methods = read_clock(args.clock, "cpu"), [name for name in forwards if name != "dense"]
    settle = None if mode == "eager" else OWN_MEMORY
    with torch.inference_mode():
        timer = InterleavedTimer(
            switch, run, between_runs(images.device), reference="dense", clock=clock, settle_seconds=settle
        )
        timer.measure(methods, min(FEWEST, args.rounds))
        timer.measure(methods, max(args.rounds - FEWEST, 0), clock() + args.seconds)
    dense = timer.result("dense").milliseconds
    rows: list[Row] = []
    for method in methods:
        found = timer.result(method)
        timed = {"over_dense": round(found.ratio, 3), "spread": round(found.ratio_spread, 3), "rounds": found.rounds}
        rows.append({"method": method, "dense_ms": round(dense, 1), **timed})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_small_patch14_dinov2")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 518, 1022], help="pixels")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[0.15], help="of the patches, in each of three blocks"
    )
    parser.add_argument("--modes", nargs="+", default=["eager", "onnxruntime", "openvino"], help="eager, or runtimes")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: with --threads 1")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--seconds", type=float, default=30.0, help="limit of each size, share and mode")
    parser.add_argument("--output", type=Path, required=True, help="folder")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    context, rows = context_of("cpu"), []
    for size in args.sizes:
        model = build(args.model, size, False, None)
        images = torch.randn(args.batch_size, 3, size, size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            patches = model(images)[0].flatten(2).shape[2]
        for share, mode in product(args.shares, args.modes):
            schedule = schedule_of(len(model.backbone.blocks), patches, share)
            common = {"model": args.model, "size": size, "patches": patches, "batch": args.batch_size, "mode": mode}
            common |= {"share": share, "removed": schedule.total_removed}
            timed = measure(contenders(model, images, list(args.methods), schedule, mode), images, mode, args)
            rows += [{**common, **row} for row in timed]
            write_table(args.output / "latency.csv", rows, context)
    print_table(
        f"Over dense, {context['device']}", rows, "patches", "mode", "method", "over_dense", "spread", "dense_ms"
    )


if __name__ == "__main__":
    main()
