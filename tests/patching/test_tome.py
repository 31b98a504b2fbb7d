"""ToMe in models, compared with reference forward passes in float64."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.cait import TalkingHeadAttn
from timm.models.convit import MHSA
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.overrides import TorchFunctionMode

import lightning_prune as lp
from helpers.reference_tome import Naive
from lightning_prune.errors import ScheduleError, UnsupportedModelError
from lightning_prune.patching import find_vision_transformer
from lightning_prune.reduction import ToMe, tome_schedule

from . import huggingface_models as hf
from . import test_torchvision as tv
from .by_hand import Parts, pruned_by_hand
from .sweep import coverage
from .test_timm_families import MODELS, bias_by_hand, neutral_rows, silenced

WHERE = {"one": [0, 6, 0, 0], "two": [5, 0, 7, 0], "all": [6, 5, 4, 3]}
UNWEIGHED = ("cait", "convit")  # their attention takes nothing that is added to its logits
every_way = pytest.mark.parametrize("where", WHERE)


def parts_of(block: Any, kwargs: dict[str, Any]) -> Parts:
    """Of timm's own block."""

    def project(x: Tensor) -> Any:
        query, key, value = block.attn.qkv(x).reshape(len(x), 3, block.attn.num_heads, -1).permute(1, 2, 0, 3)
        return block.attn.q_norm(query), block.attn.k_norm(key), value

    return Parts(block.norm1, project, block.attn.proj, block.ls1, block.norm2, block.mlp, block.ls2)


@torch.no_grad()
def run(model: Any, images: Tensor) -> Tensor:
    output: Tensor = model(images)
    return output


def expect(model: Any, images: Tensor, where: str, method: ToMe, kind: Any, after: str | None = None) -> Tensor:
    """`pruned_by_hand`; `after` is the module after the blocks of a model that pools patch tokens: it gets them all."""
    naive = Naive(method.proportional_attention, method.order == "concatenated")
    model = copy.deepcopy(model)
    if after is not None:
        model.get_submodule(after).register_forward_pre_hook(lambda _, args: (naive.restored(args[0]),))
    prefix = find_vision_transformer(model).num_prefix_tokens
    return pruned_by_hand(model, images, WHERE[where], naive, prefix, *kind)


def agree(model: Any, images: Tensor, where: str, method: ToMe, expected: Tensor, run: Any, error: Any) -> None:
    """Equal in float64 up to rounding, also for a single image; finite in half precision; restored afterwards."""
    model, images = model.double(), images.double()
    dense = run(model, images)
    with lp.patch(model, method, WHERE[where]):
        assert error(run(model, images), expected) < 1e-10
        assert error(run(model, images[1:2]), expected[1:2]) < 1e-10
    assert torch.equal(run(model, images), dense)
    assert error(dense, expected) > 1e-6
    half = model.bfloat16()
    with lp.patch(half, method, WHERE[where]):
        assert run(half, images.bfloat16()).isfinite().all()


TIMM = (lambda model: list(model.blocks), parts_of, lambda logits: logits)
TIMM_MODELS = {"vit": None, "distilled": None, "dinov2-registers": None, "qk-norm": None, "siglip": "norm"}
TIMM_MODELS |= {"pool-avg": "norm", "no-prefix": "norm"}


@every_way
@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize("name", TIMM_MODELS)
def test_timm(build: Any, images: Tensor, relative_error: Any, name: str, proportional: bool, where: str) -> None:
    model = build(name)
    expected = expect(model, images, where, ToMe(proportional), TIMM, TIMM_MODELS[name])
    agree(model, images, where, ToMe(proportional), expected, run, relative_error)


@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize(("name", "where"), [("vit", "all"), ("vit", "two"), ("distilled", "all"), ("siglip", "two")])
def test_the_published_order(
    build: Any, images: Tensor, relative_error: Any, name: str, where: str, proportional: bool
) -> None:
    """The logits of the paper's order of tokens, which are others than those of the order in the image."""
    model, method = build(name), ToMe(proportional, order="concatenated")
    expected = expect(model, images, where, method, TIMM, TIMM_MODELS[name])
    with lp.patch(model, method, WHERE[where]):
        assert relative_error(run(model, images), expected) < 1e-5
    with lp.patch(model, ToMe(proportional), WHERE[where]):
        assert relative_error(run(model, images), expected) > 1e-3
    agree(model, images, where, method, expected, run, relative_error)


@every_way
@pytest.mark.parametrize("name", hf.KINDS)
def test_transformers(name: str, images: Tensor, relative_error: Any, where: str) -> None:
    model = hf.build_hf(name)
    kind = (hf.blocks_of, hf.parts_of, hf.outputs_of)
    after = "post_layernorm" if name == "SiglipVisionModel" else None
    expected = expect(model, images, where, ToMe(), kind, after)
    agree(model, images, where, ToMe(), expected, hf.run, relative_error)


@every_way
def test_torchvision(images: Tensor, relative_error: Any, where: str) -> None:
    model = tv.build_tv()
    expected = expect(model, images, where, ToMe(), (tv.blocks_of, tv.parts_of, lambda logits: logits))
    agree(model, images, where, ToMe(), expected, run, relative_error)


def key_of(attn: Any, x: Tensor) -> Tensor:
    """Keys (H, N, D) of a module without fused attention; concatenated over heads for talking heads."""
    key: Tensor = attn.qkv(x)[0].reshape(x.shape[1], 3, attn.num_heads, -1)[:, 1].transpose(0, 1)
    return torch.cat(list(key), dim=-1)[None] if isinstance(attn, TalkingHeadAttn) else key


@contextmanager
def spied(seen: list[Tensor], places: list[int], sizes: list[float], prefix: int) -> Iterator[None]:
    """Reference attention that records its keys, selects its bias by position and adds log-sizes."""
    original = F.scaled_dot_product_attention

    def spy(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **more: Any) -> Tensor:
        if attn_mask is not None and attn_mask.shape[-1] != key.shape[-2]:
            attn_mask = bias_by_hand(attn_mask, places, prefix)
        seen.append(key[0])
        weights = torch.tensor([math.log(size) for size in sizes], dtype=query.dtype).view(1, 1, 1, -1)
        return original(query, key, value, attn_mask=weights if attn_mask is None else attn_mask + weights, **more)

    F.scaled_dot_product_attention = spy
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


@torch.no_grad()
def placed_by_hand(model: Any, image: Tensor, removed: list[int], method: ToMe) -> Tensor:
    """The output for one image, with the model's own blocks and the positions of the destinations."""
    transformer = find_vision_transformer(model)
    naive = Naive(method.proportional_attention, method.order == "concatenated")
    prefix, first = transformer.num_prefix_tokens, transformer.first_prunable_block
    entered: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hooks = [
        b.register_forward_pre_hook(lambda _, args, kwargs: entered.append((args, kwargs)), with_kwargs=True)
        for b in model.blocks
    ]
    model(image)
    for hook in hooks:
        hook.remove()
    x = entered[first][0][0]
    whole = x.shape[1]
    places, sizes = list(range(whole)), [1.0] * whole
    for index, block in enumerate(model.blocks):
        if index < first:
            continue
        kwargs = dict(entered[index][1])
        if kwargs.get("rope") is not None and len(places) < whole:
            kwargs["rope"] = neutral_rows(kwargs["rope"], [p - prefix for p in places[prefix:]])
        seen: list[Tensor] = []
        with spied(seen, places, sizes, prefix):
            if not removed[index]:
                x = block(x, **kwargs)
                continue
            with silenced(block, "norm2", "mlp"):
                middle = block(x, **kwargs)
            if isinstance(block.attn, TalkingHeadAttn | MHSA):
                seen.append(key_of(block.attn, block.norm1(x)))
            rows, kept, sizes = naive(middle[0], (seen[0], seen[0], seen[0]), sizes, removed[index], prefix)
            places = [places[k] for k in kept]
            with silenced(block, "norm1", "attn"):
                x = block(rows[None], **kwargs)
    x = naive.restored(x) if transformer.pools_patches else x
    hook = model.blocks[-1].register_forward_hook(lambda *_: x)
    try:
        return model(image)
    finally:
        hook.remove()


PLACED = [(name, removed, "kept") for name in MODELS for removed in ([0, 6, 0, 0], [0, 7, 4, 0])]
PLACED += [(name, [0, 7, 4, 0], "concatenated") for name in ("eva02", "beit-own-bias")]


@pytest.mark.parametrize(("name", "removed", "order"), PLACED)
def test_positions_are_those_of_the_destinations(
    name: str, removed: list[int], order: Any, relative_error: Any
) -> None:
    """Rotary embeddings and position biases of a merged token are those of its destination."""
    model, method = MODELS[name]().double(), ToMe(name not in UNWEIGHED, order=order)
    images = torch.randn(2, 3, *coverage.image_size(model), generator=torch.Generator().manual_seed(1)).double()
    expected = torch.cat([placed_by_hand(model, image[None], removed, method) for image in images])
    dense = run(model, images)
    with lp.patch(model, method, removed):
        found = run(model, images)
    assert relative_error(found, expected) < 1e-10
    assert relative_error(dense, expected) > 1e-6


@pytest.mark.parametrize("name", UNWEIGHED)
def test_attention_without_key_bias_is_rejected(name: str) -> None:
    model = MODELS[name]()
    with pytest.raises(UnsupportedModelError, match="tome weights the attention of later blocks by token sizes"):
        lp.patch(model, "tome", [0, 6, 0, 0])
    with pytest.raises(UnsupportedModelError, match="Use proportional_attention=False or another method"):
        lp.patch(model, ToMe(), [0, 6, 0, 0])


def test_removing_none_is_bit_identical(build: Any, images: Tensor) -> None:
    model = build()
    dense = run(model, images)
    with lp.patch(model, "tome", tome_schedule(r=0, depth=4, tokens=26)):
        assert torch.equal(run(model, images), dense)


class RecordedArguments(TorchFunctionMode):
    """Records the final arguments of fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            mask = (kwargs or {}).get("attn_mask")
            self.shapes.append(None if mask is None else tuple(mask.shape))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("proportional", [True, False])
def test_attention_is_unchanged_before_the_first_merge(build: Any, images: Tensor, proportional: bool) -> None:
    with lp.patch(build(), ToMe(proportional), [0, 5, 0, 0]) as handle, RecordedArguments() as masks:
        run(handle.transformer.root, images)
    assert masks.shapes == [None, None, *[(2, 1, 1, 21) if proportional else None] * 2]


def test_more_than_half_is_rejected(build: Any) -> None:
    model = build()
    lp.patch(model, "tome", [12, 6, 3, 2])
    with pytest.raises(ScheduleError, match="at most 6 of the 14 tokens that enter block 1 with tome, got 7"):
        lp.patch(model, "tome", [12, 7, 0, 0])


@pytest.mark.parametrize("form", ["constant", "decreasing"])
def test_both_schedules_run_to_the_last_token(build: Any, images: Tensor, leaving: Any, form: Any) -> None:
    method, model = ToMe(schedule=form), build()
    for remove in (1, 9, method.max_total_removed(26, 1, 4, 0)):
        with lp.patch(model, method, method.allocate(remove, 26, 1, 4, 0)):
            assert leaving(model, images)[-1] == 26 - remove


@pytest.mark.long
@pytest.mark.parametrize("name", ["siglip", "dinov3", "beit-own-bias"])
def test_compiles_as_a_whole(build: Any, name: str) -> None:
    """Tokens that are restored for pooling, a rotary embedding, a bias."""
    torch._dynamo.reset()
    model = MODELS[name]() if name in MODELS else build(name)
    lp.patch(model, "tome", [0, 7, 4, 0])
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for seed in range(2):
        images = torch.randn(2, 3, *coverage.image_size(model), generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(run(compiled, images), run(model, images), rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize(("name", "proportional"), [("siglip", True), ("vit", False)])
def test_exports(build: Any, draw: Any, name: str, proportional: bool) -> None:
    model = build(name, depth=2)
    lp.patch(model, ToMe(proportional), [5, 7])
    exported = torch.export.export(model, (draw(),)).module()
    images = draw(seed=1)
    torch.testing.assert_close(run(exported, images), run(model, images), rtol=1e-5, atol=1e-5)


def test_autocast(build: Any, images: Tensor) -> None:
    model = build()
    with lp.patch(model, "tome", WHERE["all"]):
        expected = run(model, images)
        with torch.autocast("cpu", torch.bfloat16):
            found = run(model, images)
    assert found.isfinite().all()
    assert found.shape == expected.shape


def test_gradients_flow_through_it(build: Any, images: Tensor) -> None:
    model = build().train()
    with lp.patch(model, "tome", WHERE["all"]):
        model(images).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
