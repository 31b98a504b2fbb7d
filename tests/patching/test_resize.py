"""Models on scaled images, compared with models that their libraries build for the smaller images."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from timm.models import beit, eva, naflexvit
from timm.models import vision_transformer as vit
from timm.models import vision_transformer_relpos as relpos
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

import lightning_prune as lp
from helpers.models import disturb
from lightning_prune.errors import ArgumentError, ScheduleError, UnsupportedModelError
from lightning_prune.patching import find_vision_transformer, trace_tokens, unpatch
from lightning_prune.patching.class_swap import is_patched_module
from lightning_prune.patching.patched_block import patch_key

from .conftest import build_vit, draw_images
from .huggingface_models import build_hf, outputs_of

PATCH, GRID, SIZE = 4, 5, 20
SMALL: dict[str, Any] = {"patch_size": PATCH, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 7}
TIMM: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "vit": (vit.VisionTransformer, {}),
    "deit3": (vit.VisionTransformer, {"no_embed_class": True, "init_values": 0.5}),
    "registers": (vit.VisionTransformer, {"reg_tokens": 4}),
    "siglip": (vit.VisionTransformer, {"class_token": False, "global_pool": "map"}),
    "no-positions": (vit.VisionTransformer, {"pos_embed": "none"}),
    "distilled": (VisionTransformerDistilled, {}),
    "eva02": (eva.Eva, {"use_rot_pos_emb": True, "ref_feat_shape": (GRID, GRID)}),
    "dinov3": (
        eva.Eva,
        {"use_abs_pos_emb": False, "use_rot_pos_emb": True, "rope_type": "dinov3", "num_reg_tokens": 4},
    ),
    "rope-mixed": (eva.Eva, {"use_rot_pos_emb": True, "rope_type": "mixed"}),
    "beit": (beit.Beit, {"use_rel_pos_bias": True, "use_abs_pos_emb": False, "init_values": 0.5}),
    "beit-shared": (beit.Beit, {"use_shared_rel_pos_bias": True, "use_abs_pos_emb": False}),
    "relpos": (relpos.VisionTransformerRelPos, {}),
    "relpos-swin": (relpos.VisionTransformerRelPos, {"rel_pos_type": "mlp-swin", "class_token": True}),
    "relpos-table": (relpos.VisionTransformerRelPos, {"rel_pos_type": "bias", "class_token": True}),
}
HF = ["ViTModel", "DeiTModel", "Dinov2Model", "Dinov2WithRegistersModel", "DINOv3ViTModel"]
HF += ["CLIPVisionModel", "SiglipVisionModel"]
GRIDS = {9: (4, 4), 5: (4, 5), 19: (2, 3)}  # tokens removed of 5 x 5 patches -> grid


def build_timm(name: str, size: int | tuple[int, int] = SIZE, **more: Any) -> Any:
    kind, options = TIMM[name]
    return disturb(kind(img_size=size, **SMALL, **options, **more))


def scaled_by_loops(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images scaled with a triangle filter in float64."""
    found = images.double().numpy()
    for axis, new in ((2, size[0]), (3, size[1])):
        old = found.shape[axis]
        scale, rows = old / new, []
        for i in range(new):
            middle = (i + 0.5) * scale
            weights = np.array([max(0.0, 1 - abs(j + 0.5 - middle) / scale) for j in range(old)])
            rows.append(np.tensordot(found, weights / weights.sum(), axes=([axis], [0])))
        found = np.stack(rows, axis=axis)
    return torch.from_numpy(found).to(images.dtype)


def small_timm(name: str, model: Any, grid: tuple[int, int]) -> Any:
    """The model that timm builds for the smaller images, with the weights that timm resamples."""
    small = build_timm(name, (PATCH * grid[0], PATCH * grid[1]))
    twin = copy.deepcopy(model)
    twin.set_input_size(img_size=(PATCH * grid[0], PATCH * grid[1]))  # resamples parameters in place
    small.load_state_dict(twin.state_dict())
    return small.eval()


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    return float((found - expected).detach().abs().max() / expected.detach().abs().max()) < tolerance


@pytest.mark.parametrize("remove", GRIDS)
@pytest.mark.parametrize("name", TIMM)
def test_timm_matches_the_model_of_the_smaller_size(name: str, remove: int) -> None:
    model, images, grid = build_timm(name), draw_images(), GRIDS[remove]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        dense = model(images)
        expected = small_timm(name, model, grid)(scaled_by_loops(images, (PATCH * grid[0], PATCH * grid[1])))
        handle = lp.patch(model, "resize", remove)
        found = model(images)
        alone = model(images[:1])
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        handle.remove()
        assert torch.equal(model(images), dense)
    assert not any(is_patched_module(module) for module in model.modules())
    assert close(found, expected)
    assert close(alone, found[:1])
    assert not close(found, dense, 1e-3)
    assert [*model.state_dict()] == [*before]


def test_the_independent_loader_of_timm_agrees() -> None:
    """`checkpoint_filter_fn`, by which timm loads weights of another size."""
    model, images = build_timm("vit"), draw_images()
    small = build_timm("vit", PATCH * 4)
    small.load_state_dict(vit.checkpoint_filter_fn(model.state_dict(), small))
    with lp.patch(model, "resize", 9), torch.no_grad():
        assert close(model(images), small(scaled_by_loops(images, (16, 16))))


@pytest.mark.parametrize("remove", GRIDS)
@pytest.mark.parametrize("name", HF)
def test_hugging_face_matches_its_own_interpolation(name: str, remove: int) -> None:
    model, images, grid = build_hf(name), draw_images(), GRIDS[remove]
    scaled = scaled_by_loops(images, (PATCH * grid[0], PATCH * grid[1]))
    asks = {} if "ino" in name.lower() else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        dense, expected = outputs_of(model(images)), outputs_of(model(scaled, **asks))
        with lp.patch(model, "resize", [remove, 0, 0, 0]):
            found = outputs_of(model(images))
        assert torch.equal(outputs_of(model(images)), dense)
    assert close(found, expected)
    assert not close(found, dense, 1e-3)


def build_torchvision(size: int = SIZE) -> Any:
    return disturb(torchvision.models.VisionTransformer(size, PATCH, 3, 4, 32, 64, num_classes=7))


def test_torchvision_matches_its_own_interpolation() -> None:
    from torchvision.models.vision_transformer import interpolate_embeddings

    model, images = build_torchvision(), draw_images()
    small = build_torchvision(PATCH * 4)
    small.load_state_dict(interpolate_embeddings(PATCH * 4, PATCH, copy.copy(model.state_dict())))
    with torch.no_grad():
        dense = model(images)
        with lp.patch(model, "resize", 9):
            assert close(model(images), small(scaled_by_loops(images, (16, 16))))
        with lp.patch(model, "resize", 5):  # 4 x 5, which torchvision has no model for
            assert model(images).isfinite().all()
        assert torch.equal(model(images), dense)


@pytest.mark.parametrize("name", ["dynamic", "naflex", "naflex-rope", "hybrid"])
def test_models_of_any_size_run_on_the_scaled_images(name: str) -> None:
    size = (24, 16)
    if name == "dynamic":
        model = build_timm("vit", dynamic_img_size=True)
    elif name == "hybrid":
        model = disturb(hybrid((24, 16), dynamic_img_size=True))
    else:
        more = {"rope_type": "axial", "attn_type": "rope"} if "rope" in name else {}
        shape = {"patch_size": PATCH, "embed_dim": 32, "depth": 3, "num_heads": 4, "pos_embed_grid_size": (5, 5)}
        model = disturb(naflexvit.NaFlexVit(naflexvit.NaFlexVitCfg(**shape, **more), 3, 7))
    images = draw_images(size=24)[..., : size[1]]
    with torch.no_grad():
        for schedule, grid in (([9, 0, 0], (5, 3)), (lp.KeepRates([0.7, 1, 1]), (5, 3)), ([12, 0, 0], (4, 3))):
            dense, expected = model(images), model(scaled_by_loops(images, (PATCH * grid[0], PATCH * grid[1])))
            with lp.patch(model, "resize", schedule):
                assert close(model(images), expected)
            assert torch.equal(model(images), dense)
        with lp.patch(model, "resize", lp.KeepRates([0.7, 1, 1])):  # for every size of images
            wide = draw_images(size=28)
            found = model(wide)
        assert close(found, model(scaled_by_loops(wide, (20, 24))))
        with lp.patch(model, "resize", [5, 0, 0]), pytest.raises(ScheduleError, match=r"4 .*or 9 .*got 5"):
            model(images)


def hybrid(size: tuple[int, int], **more: Any) -> nn.Module:
    """A convolution of stride 2, and patches of 2 of its outputs."""
    from functools import partial

    from timm.layers import HybridEmbed

    stem = nn.Conv2d(3, 8, 3, 2, 1)
    options = {**SMALL, "patch_size": 2, "img_size": size, "embed_layer": partial(HybridEmbed, backbone=stem)}
    return vit.VisionTransformer(**options, **more)


def test_a_convolutional_stem_of_fixed_size() -> None:
    model, images = disturb(hybrid((SIZE, SIZE))), draw_images()
    twin = copy.deepcopy(model)
    twin.set_input_size(img_size=16)
    with lp.patch(model, "resize", 9), torch.no_grad():
        assert close(model(images), twin(scaled_by_loops(images, (16, 16))))


def test_every_form_of_a_schedule() -> None:
    model = build_vit()
    for value, removed in ((9, [9, 0, 0, 0]), ([9, 0, 0, 0], [9, 0, 0, 0]), (0.7, [9, 0, 0, 0]), (0.3, [19, 0, 0, 0])):
        handle = lp.patch(model, "resize", value)
        found = handle.schedule
        counts = found.schedule(26, 1) if isinstance(found, lp.KeepRates) else found
        assert list(counts.removed) == removed
        assert str(counts.method) == "resize"
    handle.update(0.95)
    assert handle.schedule.schedule(26, 1).removed[0] == 5
    with pytest.raises(ScheduleError, match=r"5 \(leaves 20 patches\) or 9 \(leaves 16 patches\); got 7"):
        lp.patch(model, "resize", 7)
    with pytest.raises(ScheduleError, match="block 0 only"):
        lp.patch(model, "resize", [0, 9, 0, 0])
    with pytest.raises(ScheduleError, match="got 25"):
        lp.patch(model, "resize", 25)
    handle.remove()
    mixed = lp.KeepRates([0.7, 1, 0.5, 1], ["resize", None, "tome", None])
    with lp.patch(model, mixed) as handle:
        assert handle.schedule.schedule(26, 1).removed == (9, 0, 8, 0)


@pytest.mark.parametrize("name", ["vit", "eva02", "dinov3", "beit", "relpos", "distilled"])
def test_another_method_in_later_blocks(name: str) -> None:
    """As the method alone in the model of the smaller images."""
    model, images = build_timm(name), draw_images()
    small, scaled = small_timm(name, model, (4, 4)), scaled_by_loops(images, (16, 16))
    method = "pomt-nearest" if name == "relpos" else "tome"
    mixed = lp.Schedule([9, 3, 4], ["resize", method, method])
    with torch.no_grad(), lp.patch(model, mixed), lp.patch(small, lp.Schedule([0, 3, 4], method)):
        assert close(model(images), small(scaled), 1e-4)
    with torch.no_grad():
        assert torch.isfinite(model(images)).all()
    assert not any(is_patched_module(module) for module in model.modules())


@pytest.mark.parametrize("cuts", [[0, 5, 0], [0, 4, 4], [0, 0, 8]], ids=str)
@pytest.mark.parametrize("method", ["tome", "topk", "pomt-nearest"])
def test_another_method_in_later_blocks_to_the_last_digits(method: str, cuts: list[int], tmp_path: Path) -> None:
    """In float64, of a schedule that was saved: as the cuts alone in the model of the resampled positions."""
    model, images = build_timm("vit").double(), draw_images().double()
    small, scaled = build_timm("vit", (16, 16)).double(), scaled_by_loops(images, (16, 16))
    twin = copy.deepcopy(model)
    twin.set_input_size(img_size=(16, 16))
    small.load_state_dict(twin.state_dict())
    methods = ["resize", *(method if remove else None for remove in cuts[1:])]
    schedule = lp.Schedule.load(lp.Schedule([9, *cuts[1:]], methods).save(tmp_path / "schedule.yaml"))
    with torch.no_grad(), lp.patch(small, lp.Schedule(cuts, method), tail=False):
        expected = small(scaled)
    with torch.no_grad(), lp.patch(model, schedule, tail=False):
        assert close(model(images), expected, 1e-10)


def test_hugging_face_and_torchvision_with_another_method() -> None:
    images, mixed = draw_images(), ["resize", None, "topk"]
    scaled = scaled_by_loops(images, (16, 16))
    model = build_hf("Dinov2Model")
    with torch.no_grad():
        with lp.patch(model, lp.Schedule([0, 0, 5, 0], "topk")):
            expected = outputs_of(model(scaled))
        with lp.patch(model, lp.Schedule([9, 0, 5, 0], [*mixed, None])):
            assert close(outputs_of(model(images)), expected)
    model = build_torchvision()
    with torch.no_grad(), lp.patch(model, lp.Schedule([9, 0, 5], mixed)):
        assert model(images).isfinite().all()


def test_weights_that_change_while_it_is_patched() -> None:
    """Positions are resampled from the weights as they are: loaded, trained, moved to another precision."""
    images = draw_images()
    for name in ("vit", "eva02", "beit", "relpos-table"):
        model, other = build_timm(name), disturb(build_timm(name), seed=1)
        lp.patch(model, "resize", 9)
        with torch.no_grad():
            model(images)  # whatever is kept is kept from now on
        model.load_state_dict(other.state_dict())
        expected = small_timm(name, other, (4, 4))(scaled_by_loops(images, (16, 16)))
        assert close(model(images), expected)
        model.double()
        assert close(model(images.double()).float(), expected)
        model.float().bfloat16()
        assert close(model(images.bfloat16()).float(), expected, 0.2)


@pytest.mark.parametrize("name", ["vit", "beit", "relpos-table", "torchvision", "ViTModel"])
def test_gradients_reach_the_positions(name: str) -> None:
    model = build_torchvision() if name == "torchvision" else build_hf(name) if name in HF else build_timm(name)
    lp.patch(model, "resize", 9)
    with torch.inference_mode():
        model(draw_images())
    output = model(draw_images())
    (output if isinstance(output, Tensor) else output.last_hidden_state).sum().backward()
    positions = [key for key, _ in model.named_parameters() if "pos" in key]
    assert positions
    assert all(model.get_parameter(key).grad.abs().sum() > 0 for key in positions)


@pytest.mark.parametrize("name", ["vit", "eva02", "beit", "relpos-table", "torchvision", "ViTModel", "DINOv3ViTModel"])
def test_copies_pickles_and_exports(name: str) -> None:
    model = build_torchvision() if name == "torchvision" else build_hf(name) if name in HF else build_timm(name)
    images, depth = draw_images(), len(find_vision_transformer(model).blocks)
    output = find_vision_transformer(model).adapter.output
    with torch.no_grad():
        dense = output(model(images))
        handle = lp.patch(model, lp.Schedule([9, 0, *[0] * (depth - 3), 3], ["resize", *[None] * (depth - 2), "topk"]))
        expected = output(model(images))
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(output(copied(images)), expected)
            unpatch(copied)
            assert torch.equal(output(copied(images)), dense)
        program = torch.export.export(model, (images,), strict=False)
        assert close(output(program.module()(images)), expected)
        assert not [node for node in program.graph.nodes if "bilinear" in str(node.target)]
        assert torch.equal(output(model(images)), expected)  # nothing of the export is left behind
        handle.remove()
        assert torch.equal(output(model(images)), dense)


@pytest.mark.parametrize(
    "name",
    [
        "vit",
        *(pytest.param(each, marks=pytest.mark.long) for each in ("eva02", "relpos-table", "torchvision", "ViTModel")),
    ],
)
def test_compiles_whole(name: str) -> None:
    model = build_torchvision() if name == "torchvision" else build_hf(name) if name in HF else build_timm(name)
    output = find_vision_transformer(model).adapter.output
    images = draw_images()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        dense = output(compiled(images))
        with lp.patch(model, "resize", 9):
            assert close(output(compiled(images)), output(model(images)))
        assert torch.equal(output(compiled(images)), dense)


def test_patching_again_and_patch_keys() -> None:
    model, images = build_vit(), draw_images()
    first = lp.patch(model, "resize", 9)
    assert find_vision_transformer(model).num_tokens == 26  # of the dense model
    key = patch_key(model)
    with torch.no_grad():
        nine = model(images)
        second = lp.patch(model, "resize", 5)
        assert not first.active
        assert second.active
        assert patch_key(model) != key
        second.update(9)
        assert patch_key(model) == key
        assert torch.equal(model(images), nine)
        with pytest.raises(ScheduleError):
            second.update(8)
        assert torch.equal(model(images), nine)
        lp.patch(model, "topk", 9)
        assert not torch.equal(model(images), nine)
        unpatch(model)
    assert patch_key(model) == ()
    assert not model.dynamic_img_size
    assert model.patch_embed.strict_img_size


def test_images_of_another_size() -> None:
    model = build_vit()
    lp.patch(model, "resize", 9)
    with pytest.raises(ArgumentError, match=r"\(20, 20\).*got \(16, 16\)"):
        model(draw_images(size=16))
    with pytest.raises(UnsupportedModelError, match="got a tensor of shape"):
        model(torch.zeros(3, 20, 20))
    with pytest.raises(UnsupportedModelError, match="NLC"):
        model.forward_intermediates(draw_images())


def test_models_that_cannot_be_scaled_say_why() -> None:
    from timm.models import cait, convit

    class Custom(vit.VisionTransformer):
        def _pos_embed(self, x: Tensor) -> Tensor:
            return super()._pos_embed(x)

    refused: dict[str, tuple[Any, type[Exception], str]] = {
        "cait": (cait.Cait(img_size=SIZE, **SMALL), UnsupportedModelError, "Cait.*timm does not resample"),
        "convit": (convit.ConVit(img_size=SIZE, **SMALL, local_up_to_layer=1), ScheduleError, "from block 1"),
        "own positions": (Custom(img_size=SIZE, **SMALL), UnsupportedModelError, "Custom.*does not resample"),
        "both": (beit.Beit(img_size=SIZE, **SMALL, use_abs_pos_emb=True), UnsupportedModelError, "relative biases"),
        "not square": (build_hf("ViTModel", image_size=(20, 12)), UnsupportedModelError, "square"),
    }
    for model, error, message in refused.values():
        transformer = find_vision_transformer(model)
        schedule = [9, *[0] * (transformer.depth - 1)]
        with pytest.raises(error, match=message):
            lp.patch(model, "resize", schedule)
        assert not any(is_patched_module(module) for module in model.modules())
    assert find_vision_transformer(refused["cait"][0]).grid() is None


def test_traces_say_which_cell_covers_each_patch() -> None:
    model, images = build_vit(), draw_images()
    trace = trace_tokens(model, images, "resize", 9)
    cells = [int((at + 0.5) / 5 * 4) for at in range(5)]
    expected = [1 + 4 * row + column for row in cells for column in cells]
    assert trace.groups.tolist() == [expected] * 2
    assert trace.tokens.tolist() == [17, 17]
    assert trace.grid == (5, 5)
    assert trace.held[0].tolist() == [0, *[expected.count(1 + cell) for cell in range(16)]]
    mixed = trace_tokens(model, images, lp.Schedule([9, 0, 5, 0], ["resize", None, "topk", None]))
    assert mixed.tokens.tolist() == [12, 12]
    for image in range(2):  # patches of one cell are kept or dropped together
        together: dict[int, set[int]] = {}
        for left, cell in zip(mixed.groups[image].tolist(), expected, strict=True):
            together.setdefault(cell, set()).add(left)
        assert all(len(found) == 1 for found in together.values())
    assert (mixed.groups < 0).any()


def test_nothing_that_reads_pixels_goes_with_it() -> None:
    class Reader(lp.reduction.RandomDrop):
        reads = frozenset({"pixels"})
        name = "reader"

    from lightning_prune.patching.patch_handle import PatchHandle

    transformer = find_vision_transformer(build_vit())
    handle = PatchHandle(transformer, Reader(), [0, 0, 0, 0])
    handle.remove()
    from lightning_prune.patching.compatibility import check_schedule

    with pytest.raises(UnsupportedModelError, match="reader reads the pixels"):
        check_schedule(transformer, {0: lp.reduction.Resize(), 1: Reader()}, lp.Schedule([9, 3, 0, 0]))
