"""Exports small models of every family with every method to every format, and writes what agrees and what does not.

Each case is `lp.export` of a model as timm builds it, but narrow, shallow and for small images (see coverage.py): the
file is written, loaded in its runtime, and compared with PyTorch on images that the graph was not made from. A case
that fails in the native form of the graph is tried in the portable one. One row is added to the CSV file after each
case; cases that have a row are skipped, so that an interrupted run goes on where it ended.

    python examples/benchmarks/export_sweep.py --output examples/results/export_sweep.csv
    python examples/benchmarks/export_sweep.py --output examples/results/export_sweep.csv --markdown

AOTInductor and ExecuTorch (where it is installed) take one family and two methods.
"""

import argparse
import csv
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from coverage import build_small, image_size, stir
from tables import context_of, read_table
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.patching import find_vision_transformer
from lightning_prune.reduction import VWTInter

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {  # name -> model (of timm, if nothing else is said), and options
    "DeiT": ("deit_small_patch16_224", {}),
    "DeiT, distilled": ("deit_small_distilled_patch16_224", {}),
    "DINOv2, registers": ("vit_small_patch14_reg4_dinov2", {}),
    "CLIP": ("vit_base_patch16_clip_224", {}),
    "SigLIP": ("vit_base_patch16_siglip_224", {}),
    "ViT, parallel blocks": ("vit_base_patch16_xp_224", {}),
    "ViT, differential parallel": ("vit_dpwee_patch16_reg1_gap_256", {}),
    "EVA-02": ("eva02_tiny_patch14_224", {}),
    "DINOv3": ("vit_small_patch16_dinov3", {}),
    "BEiT": ("beit_base_patch16_224", {}),
    "ViT, relative positions": ("vit_relpos_small_patch16_224", {}),
    "NaFlexViT": ("naflexvit_base_patch16_gap", {}),
    "CaiT": ("cait_xxs24_224", {}),
    "ConViT": ("convit_tiny", {"depth": 3, "local_up_to_layer": 1}),
    "torchvision ViT": ("torchvision vit_b_16", {}),
    "Hugging Face DINOv2": ("transformers Dinov2ForImageClassification", {}),
    "OpenCLIP": ("open_clip VisionTransformer", {}),
    "Qwen3-VL encoder": ("qwen3_vit_88m_enc", {"global_pool": ""}),
    "DeepSeek-VL encoder": ("deepseek_vit_412m_enc", {"global_pool": ""}),
    "Gemma 4 encoder": ("gemma4_vit_167m_enc", {"global_pool": "none"}),
}
RESTORED = ("Qwen3-VL encoder", "DeepSeek-VL encoder", "Gemma 4 encoder")  # removed tokens are given back
METHODS = ("pomt", "pomt-nearest", "topk", "evit", "tome", "pitome", "diffrate-merge", "soft-merge", "shift", "random")
METHODS += ("resize", "vwt-intra", "vwt-inter", "mixed", "exact")
FORMATS = ("torch-export", "onnx", "openvino")
SLOW_FORMATS = ("aotinductor", "executorch")
SLOW_CASES = [("DeiT", "pomt"), ("DeiT", "tome")]
MIXED = (("topk", "tome"), ("pomt-nearest", "tome"), ("topk", "pomt"))  # early and late; the first that a family takes
COLUMNS = ("family", "model", "class", "method", "schedule", "format", "graph", "result", "max_relative_error")
COLUMNS += ("seconds", "reason")
TITLES = {"torch-export": "PyTorch", "onnx": "ONNX Runtime", "openvino": "OpenVINO"}
COMPARED = 4  # images
SIZE = 80  # pixels of the models that are not timm's, as `image_size` says


class Case(NamedTuple):
    """One export."""

    family: str
    method: str
    format: str


Row = dict[str, Any]


def cases(families: Iterable[str] = FAMILIES, slow: Sequence[str] = SLOW_FORMATS) -> list[Case]:
    """All cases; those of a family follow each other, so that it is built once."""
    found = [Case(family, method, format) for family in families for method in METHODS for format in FORMATS]
    return found + [Case(*case, format) for format in slow for case in SLOW_CASES if case[0] in families]


def build(family: str) -> nn.Module:
    """The small model of a family, with weights that are far from a fresh model's."""
    name, options = FAMILIES[family]
    if name.startswith("torchvision"):
        return stir(torchvision.models.VisionTransformer(SIZE, 16, 2, 2, 64, 128, num_classes=5))
    if name.startswith("transformers"):
        from transformers import Dinov2Config, Dinov2ForImageClassification

        small = Dinov2Config(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=SIZE, patch_size=16, num_labels=5
        )
        return stir(Dinov2ForImageClassification(small))
    if name.startswith("open_clip"):
        from open_clip.transformer import VisionTransformer

        return stir(VisionTransformer(SIZE, 16, 64, 2, 2, 2.0, output_dim=32))
    return stir(build_small(name, **{"depth": 2, **options}))


def patched(family: str, model: nn.Module, method: str) -> lp.PatchHandle:
    """Patches a model by a method, in the blocks in which it usually reduces; `mixed` by one early and another late.

    `exact` is the exact tail, which the others are exported without: it takes the place of what the last block removes.
    """
    restore: Any = "auto" if family in RESTORED else None
    transformer = find_vision_transformer(model, restore=restore)
    first, depth = transformer.first_prunable_block, transformer.depth
    if method == "vwt-inter":
        return lp.patch(
            model, VWTInter(words_of(family, model), threshold=0.5, pad_to="image"), tail=False, restore=restore
        )
    if method in ("exact", "resize"):
        return lp.patch(model, method, 0.7 if method == "resize" else None, restore=restore)
    if method == "mixed":
        removed = [0] * (depth - 2) + [4, 4]
        for index, pair in enumerate(MIXED):
            try:
                return lp.patch(
                    model, lp.Schedule(removed, [*[None] * (depth - 2), *pair]), tail=False, restore=restore
                )
            except lp.UnsupportedModelError:
                if index == len(MIXED) - 1:
                    raise
    block = 0 if method == "vwt-intra" else first
    removed = [6 if each == block else 0 for each in range(depth)]
    if method == "tome":
        removed[-1] += 4
    return lp.patch(model, method, lp.Schedule(removed), tail=False, restore=restore)


def words_of(family: str, model: nn.Module) -> lp.Vocabulary:
    """A few visual words, of noise, for patches of the size that a model has."""
    named = re.search(r"patch(\d+)", FAMILIES[family][0])
    images = torch.randn(8, 3, *image_size(model), generator=torch.Generator().manual_seed(7))
    return lp.learn_vocabulary([images], patch_size=int(named.group(1)) if named else 16, words=4, progress=False)


def measure(case: Case, models: dict[str, nn.Module]) -> Row:
    """Runs a case: the row without its key."""
    if case.family not in models:
        models.clear()
        models[case.family] = build(case.family)
    model = models[case.family]
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, *image_size(model), generator=generator)
    compared = torch.randn(COMPARED, 3, *image_size(model), generator=generator)
    try:
        handle = patched(case.family, model, case.method)
    except lp.PruneError as error:
        return {"result": "not pruned", "reason": first_line(error)}
    schedule = getattr(handle, "schedule", None)
    with handle:
        for graph in ("native", "portable"):
            found = export(model, images, compared, case.format, graph)
            if found["result"] != "failed":
                break
    return {**found, "schedule": "" if schedule is None else describe(schedule)}


def describe(schedule: lp.Schedule | lp.KeepRates) -> str:
    """A schedule in a cell: tokens removed by each block, `6 0`, `topk 4, tome 4` with several methods, or rates."""
    if isinstance(schedule, lp.KeepRates):
        return " ".join(f"{rate:.3g}" for rate in schedule.rates)
    methods = {block: str(spec) for block, spec in schedule.methods.items()}
    if len(set(methods.values())) < 2:
        return " ".join(map(str, schedule.removed))
    return ", ".join(f"{method} {schedule.removed[block]}" for block, method in methods.items())


def export(model: nn.Module, images: Tensor, compared: Tensor, format: str, graph: str) -> Row:
    """Exports a patched model, as a row."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            report = lp.export(
                model, Path(folder) / "out", images, format=format, calibration=compared, graph=graph, rounds=0
            )
        except lp.RuntimeUnavailableError:
            raise
        except lp.PruneError as error:
            return {"graph": graph, "result": "failed", "reason": first_line(error)}
    return {"graph": graph, "result": "ok", "max_relative_error": f"{report.max_relative_error:.1e}"}


def cpu_seconds() -> float:
    """Seconds of a processor, those of programs that were started (compilers) included."""
    return sum(os.times()[:4])


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]


def sweep(path: Path, wanted: Sequence[Case], deadline: float, run: Callable[..., Row] = measure) -> int:
    """Adds a row for each case that has none yet.

    Args:
        path: CSV file; made if it does not exist.
        wanted: The cases.
        deadline: Of `time.perf_counter`; no case is begun later.
        run: Runs one.

    Returns:
        Number of cases that have no row yet.
    """
    done = {Case(row["family"], row["method"], row["format"]) for row in read_table(path)} if path.exists() else set()
    left = [case for case in wanted if case not in done]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"# {name}: {value}\n" for name, value in context_of("cpu").items()]
        path.write_text("".join(lines) + ",".join(COLUMNS) + "\n", encoding="utf-8")
    models: dict[str, nn.Module] = {}
    unavailable: set[str] = set()
    for number, case in enumerate(left):
        if time.perf_counter() > deadline:
            return len(left) - number
        if case.format in unavailable:
            continue
        start = cpu_seconds()
        try:
            found = run(case, models)
        except lp.RuntimeUnavailableError as error:
            unavailable.add(case.format)
            print(f"{case.format} is left out: {first_line(error)}", flush=True)
            continue
        name = FAMILIES[case.family][0]
        kind = type(models[case.family]).__name__ if case.family in models else ""
        row = {**case._asdict(), "model": name, "class": kind, **found}
        row["seconds"] = round(cpu_seconds() - start, 1)
        with path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS, lineterminator="\n", restval="").writerow(row)
        print(f"{number + 1}/{len(left)} {' '.join(case)}: {row['result']} {row.get('reason', '')}", flush=True)
    return sum(case.format in unavailable for case in left)


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """The results as Markdown: a table of family x method, the other runtimes, and the reasons by number."""
    table = {Case(row["family"], row["method"], row["format"]): row for row in rows}
    reasons: dict[str, int] = {}
    lines = [
        f"| family | {' | '.join(f'`{method}`' for method in METHODS)} | largest error |",
        f"| --- | {' | '.join('---' for _ in METHODS)} | ---: |",
    ]
    for family in [each for each in FAMILIES if any(row["family"] == each for row in rows)]:
        cells = [_cell({f: table.get(Case(family, method, f)) for f in FORMATS}, reasons) for method in METHODS]
        errors = [row["max_relative_error"] for row in rows if row["family"] == family and row["max_relative_error"]]
        worst = max(errors, key=float) if errors else ""
        lines.append(f"| {family} | {' | '.join(cells)} | {worst} |")
    slow = [row for row in rows if row["format"] in SLOW_FORMATS]
    if slow:
        lines += ["", "| runtime | family | method | result | largest error | CPU seconds |"]
        lines += ["| --- | --- | --- | --- | ---: | ---: |"]
        for row in slow:
            result = row["result"] if row["result"] == "ok" else f"{row['result']} ({_number(row['reason'], reasons)})"
            form = ", portable graph" if row["result"] == "ok" and row["graph"] == "portable" else ""
            cells = [f"`{row['format']}`", row["family"], f"`{row['method']}`", result + form]
            lines.append(f"| {' | '.join([*cells, row['max_relative_error'], row['seconds']])} |")
    lines += ["", *(f"{number}. {reason}" for reason, number in reasons.items())]
    return "\n".join(lines)


def _cell(found: Mapping[str, Mapping[str, str] | None], reasons: dict[str, int]) -> str:
    """What a family and a method give in all runtimes: `yes`, or what does not."""
    said: dict[str, list[str]] = {}
    for format, row in found.items():
        if row is None:
            text = "not run"
        elif row["result"] == "ok":
            text = "yes" if row["graph"] == "native" else "portable"
        else:
            text = f"{'no' if row['result'] == 'failed' else 'not pruned'} ({_number(row['reason'], reasons)})"
        said.setdefault(text, []).append(TITLES[format])
    if len(said) == 1:
        return next(iter(said))
    return "; ".join(f"{text} in {', '.join(titles)}" for text, titles in said.items())


def _number(reason: str, reasons: dict[str, int]) -> int:
    return reasons.setdefault(reason, len(reasons) + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--slow", nargs="*", default=list(SLOW_FORMATS), choices=list(SLOW_FORMATS))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no case is begun later")
    parser.add_argument("--markdown", action="store_true", help="run nothing; print the table of docs/runtimes.md")
    parser.add_argument("--output", type=Path, required=True, help="CSV file; rows that it has are not run again")
    args = parser.parse_args()
    if args.markdown:
        print(markdown(read_table(args.output)))
        return
    warnings.filterwarnings("ignore")
    wanted = [case for case in cases(args.families, args.slow) if case.method in args.methods]
    left = sweep(args.output, wanted, time.perf_counter() + args.seconds)
    print(f"{left} cases have no row yet." if left else "All cases have a row.")


if __name__ == "__main__":
    main()
