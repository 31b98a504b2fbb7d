"""Nonsense for every argument of every public function and class: refused by name, with an error of the package."""

import inspect
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch

import lightning_prune as lp
from helpers.data import loader, noise_images
from helpers.models import tiny_vit
from lightning_prune import metrics, reduction, report
from lightning_prune.profiling import LatencyProfile
from lightning_prune.runtimes import parse_runtime

IMAGES = noise_images(2)
NONSENSE: dict[str, Any] = {
    "None": None,
    "nan": float("nan"),
    "text": "nonsense",
    "negative": -3,
    "fraction": 1.5,
    "empty list": [],
    "list of None": [None],
    "object": object(),
}


class Callee(NamedTuple):
    """A public function or class.

    Attributes:
        call: It.
        valid: Arguments with which it works.
        accepted: Argument -> the nonsense that has a meaning for it.
        alias: Argument -> how its error calls it instead.
    """

    call: Callable[..., Any]
    valid: dict[str, Any]
    accepted: Mapping[str, set[str]] = MappingProxyType({})
    alias: Mapping[str, str] = MappingProxyType({})


def settings(**more: Any) -> dict[str, Any]:
    return {"model": tiny_vit(), "example_inputs": IMAGES, "time_limit": 0.01, "verbose": False, **more}


def trainer() -> L.Trainer:
    return L.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, enable_checkpointing=False)


MODEL_PATH = {"module_path": {"None"}}
NAMED = {"method": {"None"}, "made_on": {"None"}}
UPDATES = {name: {"fraction"} for name in ("seconds", "images", "joules")}
CENTROIDS = torch.randn(3, 3 * 8 * 8)


def tiny_clip() -> Any:
    import transformers

    shape = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    text = {**shape, "vocab_size": 8, "max_position_embeddings": 8, "eos_token_id": 2}
    vision = {**shape, "image_size": 16, "patch_size": 8}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


CALLEES: dict[str, Callable[[], Callee]] = {
    "Schedule": lambda: Callee(lp.Schedule, {"removed": [0, 3]}, NAMED | {"method": {"None", "text"}}),
    "Schedule.single": lambda: Callee(
        lp.Schedule.single,
        {"depth": 2, "block": 1, "remove": 3},
        NAMED | {"method": {"None", "text"}},
        {"remove": "removed"},
    ),
    "Schedule.load": lambda: Callee(lp.Schedule.load, {"path": "x"}, alias={"path": "(path|nonsense)"}),
    "KeepRates": lambda: Callee(lp.KeepRates, {"rates": [1.0, 0.5]}, NAMED | {"method": {"None", "text"}}),
    "AccuracyBudget": lambda: Callee(lp.AccuracyBudget, {"max_drop": 0.1}),
    "Utility": lambda: Callee(lp.Utility, {"alpha": 0.5}),
    "LatencyBudget": lambda: Callee(lp.LatencyBudget, {"speedup": 1.5}, {"ms": {"None"}, "speedup": {"fraction"}}),
    "patch": lambda: Callee(
        lp.patch,
        {"model": tiny_vit(), "method": "tome", "schedule": [0, 3, 0, 0]},
        MODEL_PATH | {"tail": {"None"}, "restore": {"None"}},
        {"schedule": "(schedule|removed|nonsense)"},
    ),
    "trace_tokens": lambda: Callee(
        lp.trace_tokens,
        {"model": tiny_vit(), "images": IMAGES, "method": "tome", "schedule": [0, 3, 0, 0]},
        MODEL_PATH | {"restore": {"None"}},
        {"schedule": "(schedule|removed|nonsense)"},
    ),
    "profile_latency": lambda: Callee(
        lp.profile_latency,
        settings(),
        MODEL_PATH | {"counts": {"None"}, "runtime": {"None"}, "time_limit": {"None", "fraction"}},
    ),
    "compare_latency": lambda: Callee(
        lp.compare_latency,
        settings(variants={"dense": None}),
        MODEL_PATH | {"runtime": {"None"}, "time_limit": {"None", "fraction"}},
    ),
    "plan": lambda: Callee(
        lp.plan,
        settings(calibration=IMAGES),
        MODEL_PATH
        | {"runtime": {"None"}, "time_limit": {"None", "fraction"}, "objective": {"None"}, "profile": {"None"}}
        | {"tail": {"None"}, "restore": {"None"}}
        | {"labels": {"None"}, "cache_dir": {"None", "text"}},
        {"methods": "methods?", "blocks": "blocks?"},
    ),
    "bundle": lambda: Callee(
        lp.bundle,
        {"model": tiny_vit(depth=1), "output": "x", "example_inputs": IMAGES, "verbose": False},
        MODEL_PATH | {"output": {"text"}, "restore": {"None"}},
        {"methods": "methods?"},
    ),
    "export": lambda: Callee(
        lp.export,
        {"model": tiny_vit(depth=1), "output": "x", "example_inputs": IMAGES, "format": "torch-export", "rounds": 0},
        MODEL_PATH
        | {name: {"None"} for name in ("plan", "restore", "calibration", "opset", "preprocessing", "min_agreement")}
        | {"reduce_range": {"None"}}
        | {name: {"None", "fraction"} for name in ("tolerance", "time_limit")}
        | {"output": {"text"}},
        {"plan": "(plan|removed|nonsense)"},
    ),
    "load_exported": lambda: Callee(
        lp.load_exported, {"folder": "x"}, {"runtime": {"None"}}, {"folder": "(folder|nonsense)"}
    ),
    "compare": lambda: Callee(
        lp.compare,
        {"trainer": trainer(), "module": lp.ImageClassifier(tiny_vit()), "data": loader(4)},
        {
            **{name: {"None"} for name in ("methods", "speedups", "objective", "runtimes", "settings", "clock")},
            **{name: {"None"} for name in ("on_message", "on_results")},
            "output": {"None", "text"},
            "command": {"text"},
            "metric_from_step": {"None", "text"},
        },
        {"runtimes": "runtimes?"},
    ),
    "TokenPruning": lambda: Callee(
        lp.TokenPruning,
        {},
        {
            **{
                name: {"None"}
                for name in ("objective", "images_from_batch", "cache_dir", "module_path", "tail", "restore")
            },
            "calibration": {"empty list", "list of None"},
            "time_limit": {"fraction"},
            "cache_dir": {"None", "text"},
            "module_path": {"None", "text"},
        },
        {"schedule": "(schedule|removed|nonsense)"},
    ),
    "ImageClassifier": lambda: Callee(
        lp.ImageClassifier,
        {"model": tiny_vit()},
        {"weights": {"None"}, "num_classes": {"None"}, "model_kwargs": {"None"}},
        {"weights": "(weights|nonsense)"},
    ),
    "ZeroShotClassifier": lambda: Callee(
        lp.ZeroShotClassifier,
        {
            "model": tiny_clip(),
            "class_names": ["cat", "dog"],
            "tokenizer": lambda texts: torch.zeros(len(texts), 4).long(),
        },
        {"group_names": {"None"}},
        {"model": "(model|nonsense)", "tokenizer": "(tokenizer|nonsense)"},
    ),
    "DigitsData": lambda: Callee(lp.DigitsData, {}, {"num_workers": {"None"}}),
    "ImageFolderData": lambda: Callee(
        lp.ImageFolderData,
        {"root": "x"},
        {"class_map": {"None", "text"}, "data_config": {"None"}, "num_workers": {"None"}}
        | {name: {"text"} for name in ("root", "split", "dataset")},
    ),
    "ImageTableData": lambda: Callee(
        lp.ImageTableData,
        {"root": "x"},
        {name: {"None"} for name in ("group", "where", "classes", "data_config", "num_workers")}
        | {name: {"text"} for name in ("root", "table", "image", "label")}
        | {"group": {"None", "text"}},
    ),
    "Vocabulary": lambda: Callee(
        lp.Vocabulary,
        {"centroids": CENTROIDS, "patch_size": 8},
        {"mean": {"None"}, "std": {"None"}, "seed": {"None"}, "source": {*NONSENSE}},
    ),
    "Vocabulary.load": lambda: Callee(lp.Vocabulary.load, {"path": "x"}, alias={"path": "(path|nonsense)"}),
    "learn_vocabulary": lambda: Callee(
        lp.learn_vocabulary,
        {"batches": [IMAGES], "patch_size": 8, "words": 3, "progress": False},
        {"mean": {"None"}, "std": {"None"}},
        {"batches": "(batches|images)"},
    ),
    "plot": lambda: Callee(
        report.plot,
        {"result": LatencyProfile((9, 17), (5.0, 10.0), (0.1, 0.1), (9, 9), "random", 0, 4)},
        {"path": {"None", "text"}, "others": {"empty list"}},
    ),
    "parse_runtime": lambda: Callee(parse_runtime, {"runtime": "torch"}),
    "Latency": lambda: Callee(metrics.Latency, {}),
    "Energy": lambda: Callee(metrics.Energy, {}),
    "Throughput.update": lambda: Callee(metrics.Throughput().update, {"images": 3, "seconds": 1.0}, UPDATES),
    "Energy.update": lambda: Callee(metrics.Energy().update, {"joules": 1.0, "images": 3, "seconds": 1.0}, UPDATES),
    "Latency.update": lambda: Callee(metrics.Latency().update, {"seconds": 1.0}, UPDATES),
    "POMT": lambda: Callee(reduction.POMT, {}),
    "ToMe": lambda: Callee(reduction.ToMe, {}),
    "RandomDrop": lambda: Callee(reduction.RandomDrop, {}),
    "VWTInter": lambda: Callee(
        reduction.VWTInter,
        {"vocabulary": lp.Vocabulary(CENTROIDS, 8)},
        {"threshold": {"fraction"}},
        {"vocabulary": "(vocabulary|nonsense)"},
    ),
}
KINDS = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def test_every_public_function_and_class_is_here() -> None:
    made_by_others = {"LatencyProfile", "PatchHandle", "Plan"}
    public = {name for name in lp.__dir__() if callable(getattr(lp, name)) and not name.endswith("Error")}
    assert public - made_by_others <= {name.split(".")[0] for name in CALLEES}


@pytest.mark.parametrize("name", CALLEES)
def test_nonsense_is_refused_by_name(name: str) -> None:
    callee = CALLEES[name]()
    wrong = []
    for parameter in inspect.signature(callee.call).parameters.values():
        if parameter.kind not in KINDS:
            continue
        word = callee.alias.get(parameter.name, parameter.name)
        for kind, value in NONSENSE.items():
            if kind in callee.accepted.get(parameter.name, ()):
                continue
            what = f"{name}({parameter.name}={kind})"
            try:
                callee.call(**{**callee.valid, parameter.name: value})
                wrong.append(f"{what} is accepted")
            except lp.PruneError as error:
                if not re.search(rf"\b{word}\b", str(error)):
                    wrong.append(f"{what} is not named: {error}")
            except Exception as error:
                wrong.append(f"{what}: {type(error).__name__}: {error}")
    assert wrong == []


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("calibration", {"calibration": noise_images(2, size=16)}),
        ("calibration", {"calibration": noise_images(2, channels=1)}),
        ("example_inputs", {"example_inputs": IMAGES[:0], "calibration": IMAGES}),
        ("calibration", {"calibration": IMAGES[0]}),
    ],
    ids=["other size", "other channels", "none", "no batch"],
)
def test_images_that_do_not_fit_are_refused_by_name(name: str, more: dict[str, Any]) -> None:
    with pytest.raises(lp.PruneError, match=f"`{name}`"):
        lp.plan(**settings(**more))


@pytest.mark.parametrize("counts", [5, [None], "9", [], [9, 400], [9.5]])
def test_counts_that_are_none_are_refused_by_name(counts: Any) -> None:
    with pytest.raises(lp.ArgumentError, match="`counts`"):
        lp.profile_latency(**settings(counts=counts))
