"""What a schedule that was planned on eager PyTorch loses in a runtime, against one that was planned in it.

For each runtime and target speed-up, POMT in one block is planned twice: on the latency curve of eager PyTorch, and on
that of the runtime, each with the overhead of the method there. Both schedules are then exported and timed against
dense in the runtime, in one interleaved run.
The columns `left` are the tokens that are left: at equal speed, more of them are more accuracy.

    python examples/benchmarks/runtimes.py --output results/runtimes
    python examples/benchmarks/runtimes.py --runtimes openvino --speedups 1.5 --threads 1 --clock cpu --output out
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from tables import Row, context_of, print_table, write_table

import lightning_prune as lp
from lightning_prune._utils.time_limit import TimeLimit
from lightning_prune.planning.latency_model import LatencyModel
from lightning_prune.planning.mixed_latency import fit_overhead
from lightning_prune.planning.overhead_probes import schedules_to_probe, shallow_probes, uses_shallow_copy
from lightning_prune.profiling import Workload
from lightning_prune.profiling.clocks import CLOCKS
from lightning_prune.profiling.simulated_device import attention_share
from lightning_prune.runtimes import parse_runtime


def profiles(model: torch.nn.Module, images: torch.Tensor, args: argparse.Namespace) -> dict[str, lp.LatencyProfile]:
    """The latency curve of each runtime, eager PyTorch first."""
    found = {}
    for runtime in dict.fromkeys(["torch", *args.runtimes]):
        found[runtime] = lp.profile_latency(
            model, images, runtime=runtime, time_limit=args.seconds, clock=CLOCKS[args.clock]
        )
        print(f"{runtime}: dense {found[runtime].dense_ms:.1f} ms, curve in {found[runtime].seconds:.0f} s", flush=True)
    return found


def predictor(
    model: torch.nn.Module, images: torch.Tensor, profile: lp.LatencyProfile, runtime: str, args: argparse.Namespace
) -> LatencyModel:
    """Predicts the latency of a schedule as the planner does: from the curve, and the overhead of the method."""
    transformer, clock = lp.patching.find_vision_transformer(model), CLOCKS[args.clock]
    share = attention_share(Workload.of(transformer.blocks, args.batch), profile.dense_tokens)
    latency = LatencyModel.from_profile(profile, share)
    if lp.patching.has_exact_tail(transformer):
        latency = replace(latency, tail_share=1 - share)
    methods = {args.method: (lp.reduction.resolve(args.method), (args.block,))}
    with parse_runtime(runtime).applied(transformer):
        if uses_shallow_copy(transformer):
            limit = TimeLimit(None, clock)
            common = transformer, images, methods, {args.method: latency}
            timed = shallow_probes(*common, args.seconds / 4, limit, False)[args.method]
        else:
            tried = schedules_to_probe(transformer, methods, profile.dense_tokens)[args.method]
            variants: dict[str, Any] = {str(number): (args.method, each) for number, each in enumerate(tried)}
            stats = lp.compare_latency(
                model, images, {"dense": None, **variants}, time_limit=args.seconds / 4, clock=clock
            )
            timed = [(each, stats[str(number)]) for number, each in enumerate(tried)]
    return replace(latency, overhead=fit_overhead(latency, timed))


def cut_for(latency: LatencyModel, speedup: float, block: int) -> lp.Schedule:
    """The smallest cut in one block that is predicted to reach a speed-up; the largest if none does."""
    dense_tokens = int(latency.levels[-1])
    schedules = [lp.Schedule.single(latency.depth, block, remove) for remove in range(1, dense_tokens - 2)]
    return next((s for s in schedules if latency.predict(s) <= latency.dense_ms / speedup), schedules[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--method", default="pomt")
    parser.add_argument("--block", type=int, default=3)
    parser.add_argument("--runtimes", nargs="+", default=["onnxruntime", "openvino"])
    parser.add_argument("--speedups", nargs="+", type=float, default=[1.25, 1.5])
    parser.add_argument("--seconds", type=float, default=60.0, help="time limit of each curve, export included")
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS), help="cpu: with --threads 1, where others run")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, required=True, help="folder")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    model = timm.create_model(args.model, pretrained=False).eval()
    images = torch.randn(args.batch, *model.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(0))
    curves = profiles(model, images, args)
    first, *others = curves.values()
    lp.report.plot(first, args.output / "curves.png", others=others)
    predictors = {spec: predictor(model, images, curve, spec, args) for spec, curve in curves.items()}
    context, rows = context_of("cpu"), []
    for runtime in args.runtimes:
        cuts = {
            (speedup, planned_on): cut_for(predictors[planned_on], speedup, args.block)
            for speedup in args.speedups
            for planned_on in ("torch", runtime)
        }
        variants: dict[str, Any] = {str(key): (args.method, cut) for key, cut in cuts.items()}
        stats = lp.compare_latency(
            model, images, {"dense": None, **variants}, runtime=runtime, rounds=31, time_limit=args.seconds,
            clock=CLOCKS[args.clock],
        )  # fmt: skip
        for (speedup, planned_on), cut in cuts.items():
            timing = stats[str((speedup, planned_on))]
            predicted = predictors[planned_on].predict(cut) / predictors[planned_on].dense_ms
            row: Row = {
                "runtime": runtime,
                "target": speedup,
                "planned_on": planned_on,
                "left": cut.tokens(first.dense_tokens)[-1],
                "speedup": round(1 / timing.ratio, 3),
                "error": round(timing.ratio_stderr / timing.ratio**2, 3),
                "predicted": round(1 / predicted, 3),
                "rounds": timing.rounds,
            }
            rows.append({"model": args.model, "batch": args.batch, **row})
        write_table(args.output / "runtimes.csv", rows, context)
    print_table(f"Planned on eager and in the runtime, {context['device']}", rows, *list(rows[0])[2:])


if __name__ == "__main__":
    main()
