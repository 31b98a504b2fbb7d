"""The cost of finding the best cut: the default search against every token count, on simulated and real devices.

    python examples/benchmarks/profile_cost.py --simulated 50 --output examples/results/profile_cost
    python examples/benchmarks/profile_cost.py --model vit_tiny_patch16_224 --output examples/results/profile_cost

On simulated devices every latency is known, so the gap is exact: the utility of the best of all counts minus that of
the count that the search leads to, for three ways in which accuracy may fall. On a real device the search and the
exhaustive protocol of the POMT paper (arXiv 2407.05941, section 3.2) are measured one after the other, and each is
drawn relative to its own dense latency.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import timm
import torch
from matplotlib.figure import Figure
from scipy.optimize import isotonic_regression
from tables import Row, context_of, print_table, write_table

import lightning_prune as lp
from lightning_prune.profiling import InterleavedTimer, SimulatedClock, SimulatedDevice, Workload
from lightning_prune.profiling.count_search import profile_builder, search_counts

LOSSES = ((0.3, 2), (0.6, 3), (1.0, 4))  # accuracy lost with all tokens, and the power of the share that is removed
DEPTH, BLOCK, N = 12, 3, 197


def gap(chosen_on: lp.LatencyProfile, truth: dict[int, float]) -> float:
    """The relative gap of the utility, for the worst of the three ways."""
    n, counts = chosen_on.dense_tokens, [count for count in truth if count >= chosen_on.tokens[0]]
    gaps = []
    for loss, power in LOSSES:
        accuracy = {count: 1 - loss * ((n - count) / n) ** power for count in truth}
        measured = np.array(chosen_on.milliseconds)
        chosen = chosen_on.tokens[lp.Utility().best(measured, np.array([accuracy[c] for c in chosen_on.tokens]))]
        exact = lp.Utility().score(np.array([truth[c] for c in counts]), np.array([accuracy[c] for c in counts]))
        gaps.append(1 - exact[counts.index(chosen)] / exact.max())
    return float(max(gaps))


def simulated(seed: int) -> Row:
    """One random device and model, with 2% noise, 10% drift and load spikes."""
    random = np.random.default_rng(seed)
    device = SimulatedDevice(
        multiprocessors=int(random.integers(2, 133)), tile=int(random.choice([16, 32, 64, 128])),
        gigaflops=float(random.uniform(20, 200)), launch=float(random.choice([0, 1e-6, 5e-6])),
        noise=0.02, drift=0.1, spikes=0.02, seed=seed,
    )  # fmt: skip
    work = Workload.plain(int(random.choice([1, 1, 2, 3, 4, 8, 16])), width=int(random.choice([192, 384, 768])))

    def seconds(count: int) -> float:
        late = DEPTH - BLOCK
        return device.seconds(work, [N] * (BLOCK + 1) + [count] * (late - 1), [N] * BLOCK + [count] * late)

    clock, running = SimulatedClock(device), [N]
    timer = InterleavedTimer[int](
        prepare=lambda count: running.__setitem__(0, count), run=lambda: clock.spend(seconds(running[0])),
        synchronize=lambda: None, reference=N, clock=clock,
    )  # fmt: skip
    build = profile_builder("pomt", BLOCK, DEPTH, "deployed")
    profile = search_counts(timer, build, None, 3, N, 30.0, lambda: None, work.batch)
    truth = {count: 1e3 * seconds(count) for count in range(3, N + 1)}
    cliffs = {c for c in range(N // 10, N) if truth[c + 1] - truth[c] >= 0.05 * truth[N]}
    found = {cliff.below for cliff in profile.cliffs() if cliff.above == cliff.below + 1}
    return {
        "device": str(device), "batch": work.batch, "width": work.width, "counts": len(profile.tokens),
        "runs": sum(profile.rounds), "exhaustive_runs": 20 * len(truth), "cliffs": len(cliffs),
        "found": len(cliffs & found), "utility_gap_percent": round(100 * gap(profile, truth), 3),
    }  # fmt: skip


def real(name: str, size: int | None, batch: int, device: str) -> tuple[Row, lp.LatencyProfile, lp.LatencyProfile]:
    """Measures by the default search and then every count, on a model with random weights."""
    size = size or timm.get_pretrained_cfg(name).input_size[-1]
    model = timm.create_model(name, img_size=size).eval().to(device)
    images = torch.randn(batch, 3, size, size, device=device)
    start = time.perf_counter()
    profile = lp.profile_latency(model, images, method="pomt")
    quick = time.perf_counter() - start
    counts = range(profile.tokens[0], profile.dense_tokens)
    start = time.perf_counter()
    every = lp.profile_latency(model, images, method="pomt", counts=counts, time_limit=None)
    slow = time.perf_counter() - start
    # A noisy count must not be taken for the best, so the reference is the rising curve that fits all counts best.
    truth = dict(zip(every.tokens, isotonic_regression(every.milliseconds).x.tolist(), strict=True))
    row = {
        "model": name, "batch": batch, "counts": len(profile.tokens),
        "seconds": round(quick, 1), "exhaustive_counts": len(truth), "exhaustive_seconds": round(slow, 1),
        "utility_gap_percent": round(100 * gap(profile, truth), 3),
    }  # fmt: skip
    return row, profile, every


def draw(profile: lp.LatencyProfile, every: lp.LatencyProfile, path: Path) -> None:
    """Draws the curve of the search over that of all counts."""
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    label = f"every count: {len(every.tokens)} counts, {every.seconds:.0f} s"
    axes.plot(every.tokens, np.array(every.milliseconds) / every.dense_ms, ".", ms=3, color="#7f8c8d", label=label)
    label = f"the search: {len(profile.tokens)} counts, {profile.seconds:.0f} s"
    axes.plot(
        profile.tokens,
        np.array(profile.milliseconds) / profile.dense_ms,
        "o-",
        ms=4,
        lw=1.2,
        color="#1f5fa8",
        label=label,
    )
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens that leave the reducing block")
    axes.set_ylabel("latency over dense")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="lower right")
    context = profile.context
    figure.suptitle(f"{context['model']}, batch {context['batch_size']}, {context['device']}", fontsize=10)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simulated", type=int, default=0, help="how many random devices")
    parser.add_argument("--model", default=None, help="of timm, to be measured here")
    parser.add_argument("--size", type=int, default=None, help="of its images in pixels; its own if not given")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, required=True, help="folder of the CSVs")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    context = context_of(args.device)
    tables: dict[str, list[Row]] = {"simulated": [simulated(seed) for seed in range(args.simulated)], "real": []}
    for batch in args.batch if args.model else ():
        row, profile, every = real(args.model, args.size, batch, args.device)
        tables["real"].append(row)
        profile.save(args.output / f"batch_{batch}.json")
        every.save(args.output / f"batch_{batch}_every_count.json")
        draw(profile, every, args.output / f"batch_{batch}.png")
    for name, rows in tables.items():
        if not rows:
            continue
        write_table(args.output / f"{name}.csv", rows, context)
        shown = {"simulated": ("device", "batch", "counts", "cliffs", "found", "utility_gap_percent")}
        print_table(name, rows[:10], *shown.get(name, ()))
        gaps = [float(row["utility_gap_percent"]) for row in rows]
        print(f"{name}: utility gap at most {max(gaps):.2f}%, median {np.median(gaps):.2f}%, over {len(rows)}")


if __name__ == "__main__":
    main()
