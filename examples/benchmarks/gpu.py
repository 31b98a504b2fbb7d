"""Dense, pruned and floor on a CUDA device, in one run of at most 12 minutes.

Eagerly, by CUDA graphs, in ONNX Runtime's CUDA provider where it is installed (`pip install onnxruntime-gpu`), and
compiled by torch.compile where time allows. All variants of a case are timed in one interleaved run. Cases come in the
order of their cost; those that the time limit leaves out, and those that fail, have a row that says so. The CSV file is
written after each case, so that an interrupted run keeps what it has measured.

    python examples/benchmarks/gpu.py --output results/gpu
    python examples/benchmarks/gpu.py --output results/gpu --quick
"""

import argparse
import copy
import gc
import sys
import time
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import NamedTuple

import floor
import torch
from tables import Row, context_of, print_table, write_table
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.profiling import InterleavedTimer, between_runs
from lightning_prune.profiling.interleaved_timer import OWN_MEMORY
from lightning_prune.runtimes import parse_runtime

MODELS = ("deit_small_patch16_224", "vit_base_patch16_224")
BATCHES = (1, 16, 64)
PRECISIONS = ("fp32", "bf16")
GRAPHS = "cuda-graphs"
ONNX = "onnxruntime:provider=CUDAExecutionProvider"
MODES = ("eager", GRAPHS, ONNX, "compile")  # in the order of their cost
ONE, FOUR = {3: 56}, {2: 24, 4: 24, 6: 24, 8: 24}  # block -> tokens removed
METHODS = {"pomt": ONE, "topk": ONE, "tome": FOUR}
FLOORS = {"floor, one cut": ONE, "floor, four cuts": FOUR}
VARIANTS = ("dense", *METHODS, *FLOORS)
LIMIT = 12 * 60.0
FEWEST = 5  # rounds of a case, also where its time is over
QUICK_LIMIT = 90.0


class Case(NamedTuple):
    """One interleaved run."""

    model: str
    precision: str
    batch: int
    mode: str


Forwards = dict[str, Callable[[Tensor], object]]


def cases(modes: Iterable[str] = MODES, quick: bool = False) -> list[Case]:
    """All cases, those first without which the others say little: the cheap modes, DeiT-S, float32."""
    models, batches = (MODELS[:1], BATCHES[:2]) if quick else (MODELS, BATCHES)
    precisions = PRECISIONS[:1] if quick else PRECISIONS
    found = [Case(model, precision, batch, mode) for mode, precision, model, batch in product(
        modes, precisions, models, batches)]  # fmt: skip
    return [case for case in found if not (case.mode == ONNX and case.precision == "bf16")]  # it takes float32 and half


def modules(model: nn.Module) -> dict[str, nn.Module]:
    """Each variant of a model; they share its weights."""
    weights = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}

    def shared() -> nn.Module:
        return copy.deepcopy(model, dict(weights))

    found: dict[str, nn.Module] = {"dense": model}
    tail = lp.patching.has_exact_tail(lp.patching.find_vision_transformer(model))
    for method, removed in METHODS.items():
        found[method] = shared()
        lp.patch(found[method], method, lp.Schedule([removed.get(block, 0) for block in range(len(model.blocks))]))
    for name, removed in FLOORS.items():
        found[name] = floor.Floor(shared(), removed, tail).eval()
    return found


def forwards(found: dict[str, nn.Module], images: Tensor, mode: str) -> Forwards:
    """What runs each variant in a mode."""
    if mode == "eager":
        return {**found}
    if mode == GRAPHS:
        return {name: captured(module, images) for name, module in found.items()}
    if mode == "compile":
        torch._dynamo.reset()  # graphs of other cases count towards the limit of recompilations
        return {name: torch.compile(module, dynamic=False) for name, module in found.items()}
    runtime = parse_runtime(mode)
    return {name: runtime.prepare(module, images) for name, module in found.items()}


def captured(module: nn.Module, images: Tensor) -> Callable[[Tensor], object]:
    """Records a forward pass as a CUDA graph, which then runs on these very images."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # kernels are chosen and memory is allocated before the recording
            module(images)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = module(images)

    def run(_: Tensor) -> object:
        graph.replay()
        return output

    return run


def measure(case: Case, device: str, rounds: int, deadline: float) -> list[Row]:
    """Times all variants of a case in one interleaved run; `FEWEST` rounds are completed even after the deadline."""
    with torch.no_grad():  # tensors of inference mode cannot be exported
        model, images = floor.prepare(case.model, case.precision, case.batch, device)
        run, current = forwards(modules(model), images, case.mode), ["dense"]
        timer = InterleavedTimer[str](
            lambda name: current.__setitem__(0, name),
            lambda: run[current[0]](images),
            between_runs(images.device),
            "dense",
            settle_seconds=OWN_MEMORY if case.mode == ONNX else None,
        )
        timer.measure(VARIANTS[1:], rounds, deadline, min_rounds=min(FEWEST, rounds))
    floors = {method: name for method, removed in METHODS.items() for name, cut in FLOORS.items() if cut is removed}
    rows = []
    for name in VARIANTS:
        found = timer.result(name)
        row: Row = {
            "ms": round(found.milliseconds, 4),
            "images_per_second": round(case.batch / found.milliseconds * 1e3, 1),
            "over_dense": round(found.ratio, 4),
            "over_dense_error": round(found.ratio_stderr, 4),
            "over_floor": "",
            "over_floor_error": "",
            "rounds": found.rounds,
        }
        if name in floors:
            of_floor = timer.result(name, floors[name])
            row["over_floor"], row["over_floor_error"] = round(of_floor.ratio, 4), round(of_floor.ratio_stderr, 4)
        rows.append({"variant": name, **row})
    return rows


Measure = Callable[[Case, str, int, float], list[Row]]


def run_cases(
    wanted: list[Case],
    device: str,
    rounds: int,
    limit: float,
    write: Callable[[list[Row]], None],
    measuring: Measure = measure,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Row]:
    """Measures one case after the other until the time is over.

    Args:
        wanted: The cases, in the order in which they are measured.
        device: Where.
        rounds: Of each case, at most.
        limit: Seconds in all. A case is begun only if it would end in time, if it took as long as the longest so far
            in its mode; it has its share of the time that is left.
        write: Gets all rows so far, after each case.
        measuring: Measures one.
        clock: Returns seconds.

    Returns:
        The rows; one that says why for each case that was not measured.
    """
    start, rows = clock(), list[Row]()
    longest: dict[str, float] = {}
    for index, case in enumerate(wanted):
        began = clock()
        left = limit - (began - start)
        try:
            if left <= longest.get(case.mode, 0.0):
                raise TimeoutError(f"not measured: the limit of {limit:g} s is reached")
            share = left / (len(wanted) - index)
            found = [{**row, "status": "ok"} for row in measuring(case, device, rounds, began + share)]
        except Exception as error:  # a case that fails leaves the others as they are
            text = str(error).strip().partition("\n")[0]
            status = text if isinstance(error, TimeoutError) else f"{type(error).__name__}: {text}"
            found = [dict.fromkeys(COLUMNS, "") | {"status": status}]
        else:
            longest[case.mode] = max(longest.get(case.mode, 0.0), clock() - began)
        rows += [{**case._asdict(), **row} for row in found]
        write(rows)
        print(f"{clock() - start:5.0f} s  {' '.join(map(str, case))}: {found[0]['status']}", flush=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return rows


COLUMNS = ("variant", "ms", "images_per_second", "over_dense", "over_dense_error", "over_floor", "over_floor_error")
COLUMNS += ("rounds",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modes", nargs="+", default=list(MODES), help=f"some of {', '.join(MODES)}, or runtimes")
    parser.add_argument("--rounds", type=int, default=101, help="of each case, at most")
    parser.add_argument("--seconds", type=float, help=f"limit in all; {LIMIT:g}, or {QUICK_LIMIT:g} with --quick")
    parser.add_argument("--quick", action="store_true", help="DeiT-S in float32 at batch 1 and 16, 21 rounds")
    parser.add_argument("--output", type=Path, required=True, help="folder")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(f"A CUDA device is needed, and torch {torch.__version__} finds none. On a CPU run floor.py.")
    limit = args.seconds or (QUICK_LIMIT if args.quick else LIMIT)
    rounds = min(args.rounds, 21) if args.quick else args.rounds
    args.output.mkdir(parents=True, exist_ok=True)
    context = context_of("cuda") | {"cuda": str(torch.version.cuda), "matmul": torch.get_float32_matmul_precision()}
    path = args.output / "gpu.csv"
    rows = run_cases(
        cases(args.modes, args.quick), "cuda", rounds, limit, lambda found: write_table(path, found, context)
    )
    shown = ("model", "precision", "batch", "mode", "variant", "ms", "over_dense", "over_floor", "status")
    print_table(f"On a GPU, {context['device']}", rows, *shown)
    if not any(row["status"] == "ok" for row in rows):
        sys.exit("No case could be measured; gpu.csv says why.")


if __name__ == "__main__":
    main()
