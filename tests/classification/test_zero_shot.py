"""Zero-shot classification with a small CLIP that is trained on the embedded digits."""

import copy
import importlib.util
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

import lightning_prune as lp
from helpers.clock import TokenClock
from lightning_prune import ZeroShotClassifier
from lightning_prune.callbacks import TokenPruning
from lightning_prune.classification import ZeroShotModel, zero_shot
from lightning_prune.classification.preprocessing import data_config_of
from lightning_prune.errors import ArgumentError, DataError, UnsupportedModelError, WeightsError
from lightning_prune.patching import find_vision_transformer
from lightning_prune.profiling.output_kinds import choose_proxy
from lightning_prune.runtimes import parse_runtime

_PATH = Path(__file__).parents[2] / "examples" / "clip_digits.py"
_spec = importlib.util.spec_from_file_location("clip_digits", _PATH)
assert _spec is not None
assert _spec.loader is not None
example: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(example)

SIZE, PATCH = 32, 8  # 16 patches
OPTIONS: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has hardly been trained."""
    path: Path = example.train(tmp_path_factory.mktemp("clip"), SIZE, PATCH, epochs=2, width=48, depth=3)
    return path


def held_out(count: int = 500) -> Subset[Any]:
    return Subset(example.Scans("held_out", SIZE), range(count))


def make(folder: Path, **more: Any) -> ZeroShotClassifier:
    return ZeroShotClassifier(f"hf:{folder}", example.NAMES, example.TEMPLATES, **more)


def validated(module: L.LightningModule, data: Any, *callbacks: Any) -> dict[str, float]:
    trainer = L.Trainer(callbacks=list(callbacks), **OPTIONS)
    return dict(trainer.validate(module, DataLoader(data, 50), verbose=False)[0])


@torch.no_grad()
def by_hand(folder: Path, data: Any) -> tuple[list[bool], list[int]]:
    """Whether each image is right, by the whole model on one image and one text after the other; and its group."""
    clip = transformers.CLIPModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = []
    for name in example.NAMES:
        parts = []
        for template in example.TEMPLATES:
            tokens = tokenizer([template.format(name)], return_tensors="pt")
            found = clip.get_text_features(tokens["input_ids"], tokens["attention_mask"]).pooler_output[0]
            parts.append(found / found.norm())
        mean = sum(parts) / len(parts)
        texts.append(mean / mean.norm())
    right, groups = [], []
    for item in data:
        image = clip.get_image_features(item["image"][None]).pooler_output[0]
        scores = [float(image @ text / image.norm()) for text in texts]
        right.append(scores.index(max(scores)) == item["label"])
        groups.append(item["group"])
    return right, groups


def test_accuracy_and_groups_are_those_of_a_loop(folder: Path) -> None:
    module = make(folder, group_names=example.GROUPS)
    right, groups = by_hand(folder, held_out(200))
    found = validated(module, held_out(200))
    assert found["val/top1"] == pytest.approx(sum(right) / 200)
    shares = [sum(r for r, g in zip(right, groups, strict=True) if g == k) / groups.count(k) for k in (0, 1)]
    assert [found["val/group_thin"], found["val/group_thick"]] == pytest.approx(shares)
    assert found["val/worst_group"] == pytest.approx(min(shares))
    assert {"val/top5", "val/throughput", "val/latency_p50"} <= found.keys()


def test_tuples_with_groups(folder: Path) -> None:
    def rows(items: list[Any]) -> list[Tensor]:
        return [
            torch.stack([i["image"] for i in items]),
            *(torch.tensor([i[k] for i in items]) for k in ("label", "group")),
        ]

    module = make(folder, group_names=example.GROUPS)
    data = DataLoader(held_out(100), 50, collate_fn=rows)
    found = L.Trainer(**OPTIONS).validate(module, data, verbose=False)[0]
    assert found["val/worst_group"] == pytest.approx(validated(module, held_out(100))["val/worst_group"])


def test_the_model_is_the_image_part_with_its_images(folder: Path) -> None:
    module = make(folder)
    names = [type(each).__name__ for each in module.modules()]
    assert "CLIPVisionModel" in names
    assert not any("Text" in name for name in names)
    config = module.data_config
    assert config is not None
    assert config["input_size"] == (3, SIZE, SIZE)
    assert config["mean"] == (0.3,) * 3
    assert module.num_classes == 10


@pytest.mark.parametrize("method", ["pomt", "tome", "topk", "random", "evit", "resize"])
def test_methods(folder: Path, method: str) -> None:
    module, images = make(folder), torch.stack([held_out()[i]["image"] for i in range(4)])
    schedule = [0, 5, 0] if method != "resize" else [7, 0, 0]
    with torch.no_grad():
        dense = module(images)
        with lp.patch(module, method, schedule):
            assert not torch.equal(module(images), dense)
        assert torch.equal(module(images), dense)


def test_the_proxy_is_of_the_similarities(folder: Path) -> None:
    module = make(folder)
    transformer = find_vision_transformer(module)
    assert isinstance(transformer.reader, ZeroShotModel)
    assert transformer.num_classes == 10
    assert choose_proxy(module, transformer) == "soft_agreement"
    images = torch.stack([held_out()[i]["image"] for i in range(16)])
    with torch.no_grad():
        assert torch.equal(transformer.outputs(images), module(images))
    options: dict[str, Any] = {"calibration": images, "methods": "topk", "time_limit": 60, "verbose": False}
    options |= {"use_cache": False, "clock": TokenClock(transformer.blocks)}
    plan = lp.plan(module, images[:4], objective=lp.LatencyBudget(speedup=1.2), **options)
    assert plan.proxy == "soft agreement"


@pytest.mark.long
def test_training_gives_a_classifier_that_pruning_harms(tmp_path: Path) -> None:
    module = make(example.train(tmp_path / "clip", SIZE, PATCH, epochs=24, width=48, depth=3))
    dense = validated(module, held_out(200))["val/top1"]
    assert dense > 0.8
    with lp.patch(module, "topk", [0, 12, 0]):
        assert validated(module, held_out(200))["val/top1"] < dense


def test_a_run_is_pruned(folder: Path) -> None:
    module, data = make(folder, group_names=example.GROUPS), held_out(100)
    schedule = lp.Schedule([0, 12, 0], method="topk")
    pruner = TokenPruning(schedule=schedule, time_limit=1, verbose=False)
    found = validated(module, data, pruner)
    with torch.no_grad(), lp.patch(module, schedule):
        images = torch.stack([item["image"] for item in data])
        expected = module(images).argmax(1) == torch.tensor([item["label"] for item in data])
    assert found["val/top1"] == pytest.approx(float(expected.float().mean()))


def test_a_comparison_is_paired(folder: Path) -> None:
    module = make(folder, group_names=example.GROUPS)
    pruner = TokenPruning(schedule=lp.Schedule([0, 12, 0], method="topk"), time_limit=2, verbose=False, calibration=8)
    trainer = L.Trainer(callbacks=[pruner], **OPTIONS)
    found = lp.compare(trainer, module, DataLoader(held_out(60), 20), methods=["exact"], controls=False)
    row = next(row for row in found.rows if row.removed)
    assert row.top1_low is not None
    assert row.agreement is not None


def test_siglip() -> None:
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
    }
    torch.manual_seed(0)
    config = transformers.SiglipConfig(
        text_config={**shape, "vocab_size": 40, "max_position_embeddings": 8, "projection_size": 32},
        vision_config={**shape, "image_size": 32, "patch_size": 8},
    )
    siglip = transformers.SiglipModel(config).eval()
    with torch.no_grad():
        siglip.logit_bias.fill_(-3.0)

    def tokens(texts: list[str]) -> Tensor:
        return torch.tensor([[len(text) % 40, *range(7)] for text in texts])

    names, images = ["cat", "zebra"], torch.randn(3, 3, 32, 32)
    model = zero_shot(siglip, names, ["{}"], tokens)
    with torch.no_grad():
        expected = siglip(input_ids=tokens(names), pixel_values=images).logits_per_image
        torch.testing.assert_close(model(images), expected)


def test_unknown_normalisation_is_unknown(folder: Path) -> None:
    clip = transformers.CLIPModel.from_pretrained(folder)
    clip.config.name_or_path = ""
    model = zero_shot(clip, ["cat", "dog"], tokenizer=lambda texts: [[1, 4, 2]] * len(texts))
    config = data_config_of(model)
    assert config is not None
    assert not {"mean", "std"} & config.keys()


def test_the_classifier_is_judged_by_its_logits_also_with_restore(folder: Path) -> None:
    found = find_vision_transformer(make(folder), restore="auto")
    assert isinstance(found.reader, ZeroShotModel)
    assert (found.num_classes, found.reads_logits) == (10, True)


@pytest.mark.long
def test_the_whole_classifier_runs_in_a_runtime(folder: Path) -> None:
    module, images = make(folder), torch.stack([held_out()[i]["image"] for i in range(4)])
    transformer = find_vision_transformer(module)
    with torch.no_grad(), lp.patch(module, "tome", [0, 5, 0]):
        expected = module(images)
        with parse_runtime("onnxruntime").applied(transformer):
            found = module(images)
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_nothing_of_a_batch_stays(folder: Path) -> None:
    module = make(folder, group_names=example.GROUPS)
    module(torch.stack([held_out()[i]["image"] for i in range(2)]))
    copy.deepcopy(module)
    validated(module, held_out(50))
    found = L.Trainer(**OPTIONS).predict(module, DataLoader(held_out(20), 10))
    assert found is not None
    assert [tuple(each.shape) for each in found] == [(10, 10), (10, 10)]


class TestBadInput:
    @pytest.mark.parametrize("names", [[], "three", None, ["a", ""], ["a", "a"], [1, 2]])
    def test_class_names(self, folder: Path, names: Any) -> None:
        with pytest.raises(ArgumentError, match="class_names"):
            ZeroShotClassifier(f"hf:{folder}", names)

    @pytest.mark.parametrize("templates", [[], "a {}", ["a photo"], [1]])
    def test_templates(self, folder: Path, templates: Any) -> None:
        with pytest.raises(ArgumentError, match="templates"):
            ZeroShotClassifier(f"hf:{folder}", example.NAMES, templates)

    def test_a_tower_alone(self, folder: Path) -> None:
        clip = transformers.CLIPModel.from_pretrained(folder)
        for part in (clip.vision_model, clip.text_model):
            with pytest.raises(UnsupportedModelError, match=f"text tower.*got {type(part).__name__}"):
                zero_shot(part, example.NAMES, tokenizer=lambda texts: texts)

    def test_a_module_needs_a_tokenizer(self, folder: Path) -> None:
        with pytest.raises(ArgumentError, match="tokenizer"):
            zero_shot(transformers.CLIPModel.from_pretrained(folder), example.NAMES)

    def test_no_such_folder(self, tmp_path: Path) -> None:
        with pytest.raises(WeightsError, match="nothing_here"):
            ZeroShotClassifier(f"hf:{tmp_path}/nothing_here", example.NAMES)
        with pytest.raises(ArgumentError, match="hf:NAME_OR_FOLDER"):
            ZeroShotClassifier("clip-vit-base", example.NAMES)

    def test_groups(self, folder: Path) -> None:
        with pytest.raises(ArgumentError, match="group_names"):
            make(folder, group_names="thin")
        pairs = [(item["image"], item["label"]) for item in held_out(4)]
        with pytest.raises(DataError, match="groups"):
            validated(make(folder, group_names=example.GROUPS), pairs)
        named = [{**item, "group": "thin"} for item in held_out(4)]
        with pytest.raises(DataError, match="integers"):
            validated(make(folder, group_names=example.GROUPS), named)
        with pytest.raises(DataError, match=r"0 to 0, got 1"):
            validated(make(folder, group_names=["thin"]), held_out(50))

    def test_texts_must_be_finite(self) -> None:
        with pytest.raises(ArgumentError, match="texts"):
            ZeroShotModel(nn.Flatten(), torch.tensor([[float("nan")]]))
