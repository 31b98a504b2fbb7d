"""Long sequences with a dense reader: what a schedule saves at a stated similarity of the features, and its memory.

    python examples/benchmarks/dense.py --sizes 224 518 --output examples/results/dense
    python examples/benchmarks/dense.py --pretrained --images /path/to/photographs
    python examples/benchmarks/dense.py --memory --sizes 518 1022

The model returns the grids of four blocks (`DenseFeatures`). Each method is planned for `AccuracyBudget(0.01)` and
`(0.05)`, a mean cosine similarity of 0.99 and 0.95 to the dense model over taps and patches, with `restore="auto"`, and
timed with dense in one interleaved run. `--memory` gives the largest memory that exists at the same time in a forward
pass, in place of latencies.

Without `--pretrained` the weights are random, and similarities mean nothing: latencies and memory alone do. With
`--model vit_cifar_patch4_56 --weights examples/weights/vit_cifar_patch4_56.safetensors --images data/cifar10/val` a
trained model runs on its own photographs; sizes other than 56 pixels resample its positions, as it was not trained for.
"""

import argparse
import csv
import time
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_transform, resolve_data_config
from torch import Tensor
from torchvision.datasets import ImageFolder

import lightning_prune as lp
from lightning_prune.classification import DenseFeatures, load_weights
from lightning_prune.patching import find_vision_transformer
from lightning_prune.patching.models import restoring
from lightning_prune.profiling.measurement import ready_to_run
from lightning_prune.profiling.model_cost import count_model_cost

METHODS = ("tome", "pomt", "pomt-nearest", "topk", "random")
SIMILARITIES = (0.99, 0.95)
COLUMNS = ("model", "size", "patches", "batch", "threads", "method", "similarity", "speedup", "spread", "latency_ms")
COLUMNS += ("dense_ms", "found", "blocks", "removed", "tokens", "seconds")


def build(name: str, size: int, pretrained: bool, weights: str | None) -> DenseFeatures:
    """A model for images of that size, in evaluation mode."""
    known = timm.create_model(name, pretrained=False).pretrained_cfg["input_size"][1]
    options: dict[str, Any] = {} if name.startswith("vit_cifar") else {"img_size": size}
    if name.startswith("vit_cifar") and size != known:
        options = {"dynamic_img_size": True}
    model = timm.create_model(name, pretrained=pretrained, **options)
    if weights is not None:
        load_weights(model, weights)
    return DenseFeatures(model).eval()


def photographs(model: DenseFeatures, size: int, folder: str | None, count: int) -> Tensor:
    """Images (count, 3, size, size): of a folder, evenly spaced over its classes, else noise."""
    if folder is None:
        return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))
    config = resolve_data_config(model=model.backbone) | {"input_size": (3, size, size), "crop_pct": 1.0}
    data = ImageFolder(folder, create_transform(**config, is_training=False))
    return torch.stack([data[i * len(data) // count][0] for i in range(count)])


def planned(model: DenseFeatures, images: Tensor, method: str, similarity: float, batch: int, limit: float) -> Any:
    """The plan of a method for a similarity."""
    objective = lp.AccuracyBudget(1 - similarity)
    options: dict[str, Any] = {"time_limit": limit, "use_cache": False, "verbose": False, "restore": "auto"}
    return lp.plan(model, images[:batch], calibration=images, methods=method, objective=objective, **options)


def peak_mib(model: DenseFeatures, images: Tensor, method: str | None, remove: int) -> float:
    """MiB of weights and of activations that exist at the same time: dense, or with a cut at a quarter of the depth."""
    with restoring("auto"):
        transformer = find_vision_transformer(model)
    with ready_to_run(transformer):
        if method is None:
            return count_model_cost(transformer, images).peak_memory_mib
        with lp.patch(model, method, remove, restore="auto"):
            return count_model_cost(transformer, images).peak_memory_mib


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_small_patch14_dinov2")
    parser.add_argument("--pretrained", action="store_true")
    parser.add_argument("--weights")
    parser.add_argument("--images", help="a folder with a subfolder for each class")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 518])
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--calibration", type=int, default=32)
    parser.add_argument("--methods", nargs="+", default=[*METHODS, "auto"])
    parser.add_argument("--similarities", type=float, nargs="+", default=SIMILARITIES)
    parser.add_argument("--time-limit", type=float, default=120, help="seconds for each plan")
    parser.add_argument("--memory", action="store_true", help="peak memory at half the patches, in place of plans")
    parser.add_argument("--output", type=Path, help="folder for dense.csv or memory.csv")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for size in args.sizes:
        model = build(args.model, size, args.pretrained, args.weights)
        images = photographs(model, size, args.images, 1 if args.memory else args.calibration)
        with torch.no_grad():
            patches = model(images[:1])[0].flatten(2).shape[2]
        common = {"model": args.model, "size": size, "patches": patches}
        if args.memory:
            dense = peak_mib(model, images[: args.batch_size], None, 0)
            for method in args.methods:
                if method != "auto":
                    found = peak_mib(model, images[: args.batch_size], method, patches // 2)
                    rows.append({**common, "method": method, "mib": round(found, 1), "ratio": round(found / dense, 3)})
                    print(rows[-1], flush=True)
            continue
        for method in args.methods:
            for similarity in args.similarities:
                start = time.perf_counter()
                plan = planned(model, images, method, similarity, args.batch_size, args.time_limit)
                timing = plan.pruned
                rows.append(
                    {
                        **common,
                        "batch": args.batch_size,
                        "threads": torch.get_num_threads(),
                        "method": f"auto: {plan.method}" if method == "auto" else method,
                        "similarity": similarity,
                        "speedup": round(plan.speedup, 3),
                        "spread": "" if timing is None else round(timing.ratio_spread / timing.ratio**2, 3),
                        "latency_ms": round(plan.latency_ms, 2),
                        "dense_ms": round(plan.dense_ms, 2),
                        "found": round(float(plan.accuracy), 4),
                        "blocks": " ".join(map(str, plan.schedule.reducing)),
                        "removed": plan.schedule.total_removed,
                        "tokens": plan.tokens,
                        "seconds": round(time.perf_counter() - start),
                    }
                )
                print(rows[-1], flush=True)
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        name, columns = ("memory.csv", tuple(rows[0])) if args.memory else ("dense.csv", COLUMNS)
        with (args.output / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
