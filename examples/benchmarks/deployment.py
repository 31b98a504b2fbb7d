"""Dense and pruned, in floating point and in 8 bits, in each runtime: latencies of one interleaved run.

All variants of a batch size run in turn, so that every ratio is of one moment. `over_eager` is against the dense model
in eager PyTorch, `over_dense` against dense in the same runtime and in floating point, and `over_own` against dense in
the same runtime and precision: what pruning alone saves there. Accuracy depends on weights, and is measured by
`lightning-prune compare --runtimes` on a model that has some; `--accuracy CONFIG` runs that, too:

    python examples/benchmarks/deployment.py --output results/deployment
    python examples/benchmarks/deployment.py --batch-sizes 1 --threads 1 --clock cpu --output results/deployment
    python examples/benchmarks/deployment.py --accuracy configs/cifar10.yaml --output results/deployment
"""

import argparse
from pathlib import Path

import timm
import torch
from floor import CASES
from tables import Row, context_of, print_table, write_table

import lightning_prune as lp
from lightning_prune.cli.main import run
from lightning_prune.profiling import InterleavedTimer, LatencyStats, Variant, between_runs
from lightning_prune.profiling.clocks import CLOCKS
from lightning_prune.profiling.measurement import ready_to_run
from lightning_prune.profiling.model_variants import VariantSwitch, settle_seconds
from lightning_prune.runtimes import Runtime, parse_runtime
from lightning_prune.runtimes.calibration import calibrating_with

RUNTIMES = [
    "torch",
    "torch.compile",
    "onnxruntime",
    "onnxruntime:quantize=static",
    "openvino",
    "openvino:quantize=int8",
]
METHODS = ["dense", "auto", "tome", "pomt", "random", "int8", "auto+int8"]
FEWEST = 3  # rounds, whatever time they take


def variants_of(depth: int, runtimes: list[Runtime]) -> dict[tuple[str, str], Variant]:
    """(runtime, case) -> what runs: dense and the cases of `floor.py`."""
    found = {}
    for runtime in runtimes:
        found[runtime.name, "dense"] = Variant(runtime=runtime)
        for case, (method, removed, _) in CASES.items():
            schedule = lp.Schedule([removed.get(block, 0) for block in range(depth)]) if removed else None
            found[runtime.name, case] = Variant(method, schedule, runtime=runtime)
    return found


def measure(model: torch.nn.Module, images: torch.Tensor, args: argparse.Namespace) -> list[Row]:
    """A row for each runtime and case."""
    transformer, runtimes = lp.patching.find_vision_transformer(model), [parse_runtime(spec) for spec in args.runtimes]
    variants, clock = variants_of(transformer.depth, runtimes), CLOCKS[args.clock]
    switch = VariantSwitch(transformer)
    timer = InterleavedTimer[Variant](
        prepare=switch.to,
        run=lambda: transformer.compiled_root(images),
        synchronize=between_runs(images.device),
        reference=variants[runtimes[0].name, "dense"],
        clock=clock,
        settle_seconds=settle_seconds(runtimes),
    )
    with calibrating_with(images), ready_to_run(transformer):
        try:
            timer.measure(variants.values(), FEWEST)
            timer.measure(variants.values(), args.rounds - FEWEST, clock() + args.seconds)
        finally:
            switch.off()

    def against(variant: Variant, runtime: str) -> LatencyStats | None:
        other = variants.get((runtime, "dense"))
        return None if other is None else timer.result(variant, other)

    rows: list[Row] = []
    for (name, case), variant in variants.items():
        runtime = parse_runtime(name)
        own, plain, eager = (against(variant, each) for each in (name, runtime.unquantized.name, "torch"))
        assert own is not None
        rows.append(
            {
                "runtime": name,
                "case": case,
                "ms": round(own.ratio * timer.result(variants[name, "dense"]).milliseconds, 2),
                "over_own": round(own.ratio, 3),
                "error": round(own.ratio_stderr, 3),
                "over_dense": "" if plain is None else round(plain.ratio, 3),
                "over_eager": "" if eager is None else round(eager.ratio, 3),
                "rounds": own.rounds,
            }
        )
    return rows


def accuracy_commands(config: str, args: argparse.Namespace) -> list[list[str]]:
    """The commands that compare accuracies, one for each batch size."""
    # The quantized runtimes are the rows in 8 bits of the others.
    runtimes = list(dict.fromkeys(parse_runtime(spec).unquantized.name for spec in args.runtimes))
    targets, limit = [str(speedup) for speedup in args.speedups], str(args.time_limit)
    return [
        [
            *("compare", "--config", config, "--methods", *args.methods, "--speedups", *targets),
            *("--runtimes", *runtimes, "--prune.time_limit", limit, "--data.batch_size", str(batch)),
            *("--output", str(args.output / f"accuracy_batch_{batch}"), *args.more),
        ]
        for batch in args.batch_sizes
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--runtimes", nargs="+", default=RUNTIMES)
    parser.add_argument("--rounds", type=int, default=51)
    parser.add_argument("--seconds", type=float, default=120.0, help="limit of each batch size, after converting")
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS), help="cpu: with --threads 1, where others run")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--accuracy", metavar="CONFIG", help="compare accuracies of the model of a config, too")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="of --accuracy")
    parser.add_argument("--speedups", nargs="+", type=float, default=[1.25, 1.5], help="of --accuracy")
    parser.add_argument("--time-limit", type=float, default=600.0, help="of each comparison of --accuracy")
    parser.add_argument("--output", type=Path, required=True, help="folder")
    args, args.more = parser.parse_known_args()
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    model = timm.create_model(args.model, pretrained=False).eval()
    generator = torch.Generator().manual_seed(0)
    context, rows = {**context_of("cpu"), "clock": args.clock}, []
    for batch in args.batch_sizes:
        images = torch.randn(batch, *model.pretrained_cfg["input_size"], generator=generator)
        found = measure(model, images, args)
        rows += [{"model": args.model, "batch": batch, **row} for row in found]
        write_table(args.output / "deployment.csv", rows, context)
    print_table(f"In each runtime, {context['device']}", rows, *list(rows[0])[1:])
    for command in [] if args.accuracy is None else accuracy_commands(args.accuracy, args):
        status = run(command)
        if status not in (0, 3):
            raise SystemExit(status)


if __name__ == "__main__":
    main()
