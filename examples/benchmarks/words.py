"""The number of tokens that visual words (vwt-inter) leave of photographs, and the throughput that this gives.

Words are learned from every second image of a folder (patches of 16 x 16 pixels, resized and normalised as for DeiT-S),
and the tokens of the other images are counted; no weights are needed for that. With `--throughput`, photographs are
also read, decoded and run through a DeiT-S with random weights, alternately dense and with words.

    python examples/benchmarks/words.py --root path/to/photographs --output examples/results/imagenet_words
"""

import argparse
import csv
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

import lightning_prune as lp
from lightning_prune.profiling import InterleavedTimer, measurement_context
from lightning_prune.reduction import VWTInter
from lightning_prune.reduction.visual_words import group_by_word
from lightning_prune.reduction.word_learning import WordLearner


def batches(dataset: Dataset[Any], size: int = 16, workers: int = 0) -> Iterator[Tensor]:
    for images, _ in DataLoader(dataset, batch_size=size, num_workers=workers):
        yield images


def learned(
    dataset: Dataset[Any], counts: list[int], side: int, seed: int, config: dict[str, Any]
) -> list[lp.Vocabulary]:
    """Vocabularies of all sizes; every image is decoded once."""
    learners = [WordLearner(side, count, seed) for count in counts]
    for images in batches(dataset):
        for learner in learners:
            learner.add(images)
    return [learner.finish(config["mean"], config["std"]) for learner in learners]


def lengths(
    dataset: Dataset[Any], vocabularies: list[lp.Vocabulary], thresholds: list[float], patches: int
) -> dict[tuple[int, float], Tensor]:
    """Number of words and threshold -> patch tokens of each image; every image is decoded once."""
    counted: dict[tuple[int, float], list[Tensor]] = {}
    for images in batches(dataset):
        for words in vocabularies:
            for threshold in thresholds:
                counts = group_by_word(images, patches, words, threshold).counts
                counted.setdefault((len(words), threshold), []).append(counts)
    return {key: torch.cat(counts).double() for key, counts in counted.items()}


def longest(counts: Tensor, batch: int) -> float:
    """The length to which the images of a batch are padded, on average."""
    return torch.stack([part.max() for part in counts.split(batch)]).mean().item()


def throughput(
    model: nn.Module, held_out: Dataset[Any], method: VWTInter, size: int, images: int, rounds: int
) -> dict[str, object]:
    """Images per second from the file to the logits, alternately dense and with words, on the same images."""
    some = Subset(held_out, range(images))
    handle = lp.patch(model, method)

    def prepare(variant: str) -> None:
        if variant == "words":
            handle.update()
        else:
            handle.remove()

    def run() -> None:
        for batch in batches(some, size):
            model(batch)

    with torch.inference_mode():
        timer = InterleavedTimer(prepare, run, lambda: None, reference="dense")
        timer.measure(["dense", "words"], rounds)
        handle.remove()
        context = measurement_context(model, next(batches(some, size)))
    dense, pruned = timer.result("dense"), timer.result("words")
    return {
        "batch_size": size,
        "dense_images_per_s": round(1e3 * images / dense.milliseconds, 2),
        "words_images_per_s": round(1e3 * images / pruned.milliseconds, 2),
        "speedup": round(1 / pruned.ratio, 4),
        "ratio_spread": round(pruned.ratio_spread, 4),
        "images": images,
        "rounds": pruned.rounds,
        **{key: context[key] for key in ("model", "device", "threads", "precision", "torch", "timm")},
    }


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"Written: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", required=True, help="folder with one subfolder a class")
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--words", type=int, nargs="+", default=[100, 1000, 10000])
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.1, 0.2])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results/words"))
    parser.add_argument("--vocabularies", type=Path, default=Path("results/words"), help="learned ones are kept there")
    parser.add_argument("--throughput", action="store_true", help="measure that, and not the lengths")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--images", type=int, default=64, help="images of a measurement of throughput")
    parser.add_argument("--rounds", type=int, default=11)
    args = parser.parse_args()
    model = timm.create_model(args.model, pretrained=False).eval()
    config = resolve_model_data_config(model)
    patches, side = model.patch_embed.num_patches, model.patch_embed.patch_size[0]
    data = lp.ImageFolderData(args.root, data_config=config)
    data.setup("predict")
    total = len(data.dataset)
    learned_from, held_out = (Subset(data.dataset, range(start, total, 2)) for start in (0, 1))
    rows: list[dict[str, object]] = []
    kept = {count: args.vocabularies / f"words_{count}.safetensors" for count in args.words}
    if not all(path.exists() for path in kept.values()):
        for words in learned(learned_from, args.words, side, args.seed, config):
            words.save(kept[len(words)])
    vocabularies = [lp.Vocabulary.load(path) for path in kept.values()]
    if args.throughput:
        for words, threshold, size in product(vocabularies, args.thresholds, args.batch_sizes):
            figures = throughput(model, held_out, VWTInter(words, threshold), size, args.images, args.rounds)
            rows.append({"words": len(words), "threshold": threshold, **figures})
            print(rows[-1])
    else:
        for (words, threshold), counts in lengths(held_out, vocabularies, args.thresholds, patches).items():
            low, high = counts.quantile(torch.tensor([0.05, 0.95], dtype=counts.dtype)).tolist()
            rows.append(
                {
                    "words": words,
                    "threshold": threshold,
                    "patch_tokens": patches,
                    "mean": round(counts.mean().item(), 2),
                    "percentile_5": round(low, 1),
                    "percentile_95": round(high, 1),
                    "longest_of_4": round(longest(counts, 4), 2),
                    "longest_of_16": round(longest(counts, 16), 2),
                    "images": len(counts),
                    "learned_from_images": len(learned_from),
                    "learned_from_patches": len(learned_from) * patches,
                    "seed": args.seed,
                }
            )
            print(rows[-1])
    write(args.output / ("throughput.csv" if args.throughput else "lengths.csv"), rows)


if __name__ == "__main__":
    main()
