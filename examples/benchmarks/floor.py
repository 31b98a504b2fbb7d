"""How close a patched model comes to its floor: the same dense blocks, run on a slice of the tokens.

The floor does not spend any time on choosing tokens, so measured / floor is the cost of the method and of the patch.
It has the exact tail where the patch has it: only prefix tokens enter the last MLP; the case `exact` is that alone.
Pruned and floor are timed alternately in one interleaved run; ratios are medians over rounds.

    python examples/benchmarks/floor.py --output results/floor
    python examples/benchmarks/floor.py --models deit_small_patch16_224 --batch-sizes 1 --trace --output results/floor
    python examples/benchmarks/floor.py --modes eager default reduce-overhead --device cuda --output results/floor
    python examples/benchmarks/floor.py --modes eager onnxruntime openvino --precisions fp32 --output results/floor

`--modes` other than eager compile or convert both the floor and the patched model: those of torch.compile
(reduce-overhead uses CUDA graphs), or a runtime by its spec.
"""

import argparse
import copy
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import timm
import torch
from matplotlib.figure import Figure
from tables import Row, context_of, print_table, write_table
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.patching.block_split import PRE_NORM
from lightning_prune.profiling import InterleavedTimer, between_runs
from lightning_prune.profiling.clocks import read_clock
from lightning_prune.profiling.interleaved_timer import OWN_MEMORY
from lightning_prune.runtimes import parse_runtime

FEWEST = 5  # rounds of the slowest case
CASES = {  # name -> method, what each of 12 blocks removes, the ratio to stay below
    "pomt": ("pomt", {3: 56}, 1.02),
    "topk": ("topk", {3: 56}, 1.02),
    "exact": ("exact", {}, 1.02),
    "tome, four blocks": ("tome", {2: 24, 4: 24, 6: 24, 8: 24}, 1.05),
}
COMPILED = ("default", "reduce-overhead", "max-autotune")  # any other mode but eager is the spec of a runtime


def floor_forward(model: nn.Module, images: Tensor, removed: dict[int, int], tail: bool) -> Tensor:
    """The forward of the unpatched model, with a slice of the tokens between attention and MLP of some blocks."""
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
    last = len(model.blocks) - 1
    for index, layer in enumerate(model.blocks):
        if index in removed or (tail and index == last):
            x = PRE_NORM.attention(layer, x)
            left = model.num_prefix_tokens if tail and index == last else x.shape[1] - removed[index]
            x = PRE_NORM.mlp(layer, x[:, :left].contiguous())
        else:
            x = layer(x)
    return model.forward_head(model.norm(x))


class Floor(nn.Module):
    """`floor_forward` as a module, which a runtime can convert."""

    def __init__(self, model: nn.Module, removed: dict[int, int], tail: bool) -> None:
        super().__init__()
        self.model, self.removed, self.tail = model, removed, tail

    def forward(self, images: Tensor) -> Tensor:
        return floor_forward(self.model, images, self.removed, self.tail)


def apply(model: nn.Module, case: str) -> lp.PatchHandle:
    """Patches a model for a case."""
    method, removed, _ = CASES[case]
    if not removed:
        return lp.patch(model, method)
    return lp.patch(model, method, lp.Schedule([removed.get(block, 0) for block in range(len(model.blocks))]))


def prepare(name: str, precision: str, batch: int, device: str) -> tuple[nn.Module, Tensor]:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    model = timm.create_model(name, pretrained=False).eval().to(device, dtype)
    size = model.pretrained_cfg["input_size"]
    return model, torch.randn(batch, *size, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def contenders(model: nn.Module, images: Tensor, case: str, mode: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """Dense, pruned and the floor on the same weights; if compiled or converted, each has a graph of its own."""
    removed = CASES[case][1]
    weights = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    pruned, floor = copy.deepcopy(model, dict(weights)), copy.deepcopy(model, dict(weights))
    tail = apply(pruned, case).has_tail
    found: dict[str, nn.Module] = {"dense": model, "pruned": pruned, "floor": Floor(floor, removed, tail).eval()}
    if mode == "eager":
        return {**found}
    if mode not in COMPILED:
        runtime = parse_runtime(mode)
        return {name: runtime.prepare(module, images) for name, module in found.items()}
    torch._dynamo.reset()  # graphs of other cases count towards the limit of recompilations
    return {name: torch.compile(forward, mode=mode, dynamic=False) for name, forward in found.items()}


def measure(model: nn.Module, images: Tensor, case: str, mode: str, args: argparse.Namespace) -> Row:
    _, removed, limit = CASES[case]
    forwards, current = contenders(model, images, case, mode), ["dense"]

    def switch(variant: str) -> None:
        current[0] = variant

    def run() -> Tensor:
        return forwards[current[0]](images)

    device = images.device
    clock = read_clock(args.clock, device.type)
    with torch.inference_mode():
        settle = None if mode == "eager" or mode in COMPILED else OWN_MEMORY
        common: dict[str, Any] = {"clock": clock, "settle_seconds": settle}
        timer = InterleavedTimer(switch, run, between_runs(device), reference="floor", **common)
        for variant in [*forwards] * 2 if mode in COMPILED else []:  # to compile, then to record CUDA graphs
            switch(variant)
            run()
        timer.measure(["pruned"], min(FEWEST, args.rounds))
        timer.measure(["pruned"], args.rounds - FEWEST, clock() + args.seconds)
        over = InterleavedTimer(switch, run, between_runs(device), reference="dense", **common)
        over.measure(["pruned"], max(args.rounds // 3, 3), clock() + args.seconds / 3)
    ratio, pruned = timer.result("pruned"), over.result("pruned")
    return {
        "mode": mode,
        "case": case,
        "removed": sum(removed.values()),
        "dense_ms": round(over.result("dense").milliseconds, 2),
        "pruned_over_dense": round(pruned.ratio, 3),
        "pruned_over_floor": round(ratio.ratio, 4),
        "spread": round(ratio.ratio_spread, 4),
        "error": round(1.2533 * ratio.ratio_spread / 0.6745 / ratio.rounds**0.5, 4),  # standard error of the median
        "rounds": ratio.rounds,
        "limit": limit,
    }


def trace(model: nn.Module, images: Tensor, case: str) -> str:
    """The time of each operator in a pruned run, from torch's profiler."""
    with apply(model, case), torch.inference_mode():
        for _ in range(3):
            model(images)
        with torch.profiler.profile() as profiler:
            for _ in range(5):
                model(images)
    by = "self_cuda_time_total" if images.is_cuda else "self_cpu_time_total"
    return str(profiler.key_averages().table(sort_by=by, row_limit=18, max_name_column_width=40))


def draw(rows: list[Row], path: Path) -> None:
    """Draws a dot for each case with twice its standard error, and the ratios to stay below."""
    figure = Figure(figsize=(8, 0.28 * len(rows) + 1.4), layout="constrained")
    axes = figure.subplots()
    colors = dict(zip(CASES, ("#1f5fa8", "#16803c", "#7d3c98", "#d35400"), strict=True))
    for place, row in enumerate(reversed(rows)):
        axes.errorbar(row["pruned_over_floor"], place, xerr=2 * row["error"], fmt="o", color=colors[row["case"]], ms=4)
        axes.plot([row["limit"]] * 2, [place - 0.4, place + 0.4], color="#c0392b", lw=1.2)
    modes = [f"compiled ({r['mode']})" if r["mode"] in COMPILED else r["mode"] for r in rows]
    labels = [
        f"{r['model'].split('_patch')[0]}, {r['precision']}, {mode}, batch {r['batch']}: {r['case']}"
        for r, mode in zip(rows, modes, strict=True)
    ]
    axes.set_yticks(range(len(rows)), labels[::-1], fontsize=7)
    axes.axvline(1, color="#7f8c8d", lw=0.8)
    axes.set_xlabel(
        "latency over that of the same blocks on a slice of the tokens\n(bar: two standard errors; red: goal)"
    )
    axes.xaxis.label.set_size(8)
    axes.grid(axis="x", alpha=0.25)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["deit_small_patch16_224", "vit_base_patch16_224"])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--modes", nargs="+", default=["eager"], help=f"eager, {', '.join(COMPILED)}, or runtimes")
    parser.add_argument(
        "--clock", default="wall", choices=["wall", "cpu"], help="cpu: with --threads 1, where others run"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=101)
    parser.add_argument("--seconds", type=float, default=15.0, help="limit of each case")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--trace", action="store_true", help="also write a profiler's table of each case")
    parser.add_argument("--output", type=Path, required=True, help="folder")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    context, rows = context_of(args.device), []
    for name in args.models:
        for precision in args.precisions:
            for batch in args.batch_sizes:
                model, images = prepare(name, precision, batch, args.device)
                for mode, case in product(args.modes, args.cases):
                    row = measure(model, images, case, mode, args)
                    rows.append({"model": name, "precision": precision, "batch": batch, **row})
                    write_table(args.output / "floor.csv", rows, context)
                    if args.trace and mode == "eager":
                        name_of_trace = f"trace_{name}_{precision}_{batch}_{case.split(',')[0]}.txt"
                        (args.output / name_of_trace).write_text(trace(model, images, case))
    shown = ("model", "precision", "mode", "batch", "case", "pruned_over_floor", "error", "limit")
    print_table(f"Over the floor, {context['device']}", rows, *shown)
    draw(rows, args.output / "floor.png")


if __name__ == "__main__":
    main()
