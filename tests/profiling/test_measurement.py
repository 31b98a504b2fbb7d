import numpy as np
import pytest
import torch
from torch import nn

import lightning_prune as lp
from helpers.clock import TokenClock
from helpers.data import noise_images
from helpers.models import tiny_vit
from helpers.watch import before_forward
from lightning_prune.patching.class_swap import is_patched_module
from lightning_prune.profiling import InterleavedTimer, resolve_block
from lightning_prune.profiling.count_search import profile_builder, search_counts
from lightning_prune.runtimes import is_compiled

IMAGES = noise_images(2)


class Device:
    """Hardware that works in waves: latency against tokens is a staircase, times noise, under its own clock."""

    def __init__(self, n, cliffs, noise=0.0, slope=0.02, drop=1.0):
        self.n, self.cliffs, self.noise, self.slope, self.drop = n, cliffs, noise, slope, drop
        self.now, self.tokens, self.random = 0.0, n, np.random.default_rng(0)
        self.measured: set[int] = set()

    def milliseconds(self, tokens):
        return 5.0 + self.slope * tokens + self.drop * sum(tokens > cliff for cliff in self.cliffs)

    def prepare(self, tokens):
        self.tokens = tokens
        self.measured.add(tokens)

    def run(self):
        self.now += 1e-3 * self.milliseconds(self.tokens) * (1 + self.noise * self.random.standard_normal())

    def explore(self, time_limit, counts=None):
        timer = InterleavedTimer(self.prepare, self.run, lambda: None, self.n, clock=lambda: self.now)
        build = profile_builder("pomt", 3, 12, "deployed")
        return search_counts(timer, build, counts, 3, self.n, time_limit, lambda: None)


@pytest.mark.parametrize("cliffs", [(), (128,), (65, 128, 177), (192,)])
def test_finds_planted_cliffs_to_the_token_within_the_time(cliffs):
    device = Device(197, cliffs, noise=0.01)
    profile = device.explore(time_limit=20.0)
    assert [(cliff.above, cliff.below) for cliff in profile.cliffs()] == [(c + 1, c) for c in sorted(cliffs)[::-1]]
    assert device.now < 20.5
    assert len(device.measured) <= 40


def test_measures_the_latency_that_is_there():
    device = Device(197, (128,), noise=0.02)
    profile = device.explore(time_limit=20.0)
    for tokens in profile.tokens:
        assert profile.latency_ms(tokens) == pytest.approx(device.milliseconds(tokens), rel=0.03)


def test_stops_early_when_the_figures_are_precise():
    device = Device(197, (), noise=0.0)
    device.explore(time_limit=1000.0)
    assert device.now < 5.0


def test_a_short_limit_still_gives_a_coarse_curve():
    device = Device(197, (128,))
    profile = device.explore(time_limit=1e-3)
    assert profile.tokens == (32, 64, 128, 197)
    assert profile.rounds == (3, 3, 3, 3)  # fewer say nothing of the noise


def test_given_counts_are_measured_and_no_others():
    device = Device(197, (128,))
    assert device.explore(time_limit=5.0, counts=[100, 150]).tokens == (100, 150, 197)
    assert device.explore(time_limit=1e-3, counts=range(100, 150)).tokens == (*range(100, 150), 197)


def test_without_a_limit_every_count_gets_twenty_rounds():
    profile = Device(50, ()).explore(time_limit=None, counts=range(40, 50))
    assert profile.rounds[:-1] == (20,) * 10


def test_profile_of_a_real_model_leaves_it_as_it_was():
    model = tiny_vit(depth=3).train()
    model.blocks[1].eval()
    before = model.state_dict()
    flags = [module.training for module in model.modules()]
    profile = lp.profile_latency(model, IMAGES, method="pomt", block=1, time_limit=0.2, verbose=False)
    assert profile.dense_tokens == 17
    assert (profile.block, profile.depth, profile.method) == (1, 3, "pomt")
    assert profile.context["batch_size"] == 2
    assert profile.context["precision"] == "float32"
    assert not any(map(is_patched_module, model.modules()))
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_by_default_all_blocks_see_the_same_count():
    model = tiny_vit()
    clock = TokenClock(model.blocks)
    profile = lp.profile_latency(model, IMAGES, counts=[5, 9], time_limit=5, verbose=False, clock=clock)
    assert (profile.method, profile.block) == ("random", 0)
    assert profile.milliseconds == pytest.approx((4 * 5, 4 * 9, 4 * 17))


def test_measures_the_cut_that_is_deployed(monkeypatch):
    """Every count asked for is what really leaves the reducing block, mean token included."""
    model, seen = tiny_vit(), set()
    before_forward(model.blocks[1].mlp, lambda _, args: seen.add(args[0].shape[1]))
    profile = lp.profile_latency(
        model, IMAGES, method="pomt", block=1, counts=[5, 9, 12], time_limit=0.2, verbose=False
    )
    assert seen == {5, 9, 12, 17} == set(profile.tokens)


def test_latency_follows_the_clock():
    """A millisecond for each token that leaves a block: three blocks of four after the cut, or the cut's own too."""
    model = tiny_vit()
    clock = TokenClock(model.blocks)
    profile = lp.profile_latency(
        model, IMAGES, method="pomt", block=1, counts=[5, 9], time_limit=5, verbose=False, clock=clock
    )
    assert profile.tokens == (5, 9, 17)
    assert profile.milliseconds == pytest.approx((17 + 3 * 5, 17 + 3 * 9, 4 * 17))
    assert profile.seconds == pytest.approx(clock.now)
    schedule = lp.Schedule([0, 0, 6, 0])
    timings = lp.compare_latency(model, IMAGES, {"dense": None, "pomt": ("pomt", schedule)}, verbose=False, clock=clock)
    assert timings["dense"].milliseconds == pytest.approx(4 * 17)
    assert timings["pomt"].milliseconds == pytest.approx(2 * 17 + 11 + 1)  # the class token leaves the last block
    assert {timing.rounds for timing in timings.values()} == {31}


def test_the_time_limit_is_on_the_clock():
    """Dense takes 68 ms and the variant 46: after warm-up, all runs of eight rounds begin within a second."""
    model = tiny_vit()
    variants = {"dense": None, "pomt": ("pomt", lp.Schedule([0, 0, 6, 0]))}
    timings = lp.compare_latency(model, IMAGES, variants, time_limit=1.0, verbose=False, clock=TokenClock(model.blocks))
    assert timings["pomt"].rounds == 8


def test_paper_protocol_drops_random_tokens_before_block_0_at_every_count():
    model, seen = tiny_vit(), set()
    before_forward(model.blocks[0].attn.qkv, lambda _, args: seen.add(args[0].shape[1]))
    profile = lp.profile_latency(model, IMAGES, method="pomt", protocol="paper", time_limit=1.0, verbose=False)
    assert profile.tokens == tuple(range(3, 18)) == tuple(sorted(seen))  # 2 is more than pomt can deploy
    assert (profile.protocol, profile.method) == ("paper", "random")


def test_model_is_restored_when_measuring_fails():
    model = tiny_vit()
    calls = []

    def fail(_, args):
        calls.append(args[0].shape[1])
        if args[0].shape[1] < 17:
            raise RuntimeError("out of memory")

    before_forward(model.blocks[3].mlp, fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        lp.profile_latency(model, IMAGES, time_limit=0.2, verbose=False)
    assert not any(map(is_patched_module, model.modules()))


def test_context_sees_precision_and_compilation():
    with torch.autocast("cpu", torch.bfloat16):
        profile = lp.profile_latency(tiny_vit(), IMAGES, counts=[9], time_limit=0.05, verbose=False)
    assert profile.context["precision"] == "bf16-mixed"
    half = lp.profile_latency(tiny_vit().bfloat16(), IMAGES.bfloat16(), counts=[9], time_limit=0.05, verbose=False)
    assert half.context["precision"] == "bfloat16"
    compiled = torch.compile(tiny_vit(), backend="eager")
    profile = lp.profile_latency(compiled, IMAGES, counts=[9], time_limit=0.05, verbose=False)
    assert profile.context["compiled"]
    assert profile.context["model"] == "VisionTransformer"


@pytest.mark.long
def test_a_compiled_model_is_profiled_compiled():
    """Otherwise the curve would be that of another program than the one that runs."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(tiny_vit(depth=1), backend=backend)
    lp.profile_latency(nn.Sequential(compiled), IMAGES, counts=list(range(8, 17)), time_limit=0.1, verbose=False)
    assert len(graphs) >= 10  # one for each count: more than the 8 that dynamo allows by itself


def test_a_model_compiled_in_place_is_profiled_compiled():
    """Its graph is there already when the profile begins, and sees no hooks."""
    model = tiny_vit()
    model.compile(backend="eager")
    model(IMAGES)
    profile = lp.profile_latency(model, IMAGES, counts=[9], time_limit=0.1, verbose=False)
    assert profile.context["compiled"]
    assert profile.tokens == (9, 17)


def test_compare_latency_needs_a_dense_variant_and_refers_to_it():
    model, schedule = tiny_vit(), lp.Schedule.single(4, 1, 6)
    timings = lp.compare_latency(
        model, IMAGES, {"dense": None, "pomt": ("pomt", schedule)}, rounds=3, time_limit=5, verbose=False
    )
    assert timings["dense"].ratio == 1.0
    assert timings["pomt"].rounds == 3
    assert not any(map(is_patched_module, model.modules()))
    with pytest.raises(lp.ArgumentError, match=r"`variants` must contain None .*, got pomt"):
        lp.compare_latency(model, IMAGES, {"pomt": ("pomt", schedule)}, verbose=False)
    with pytest.raises(lp.ScheduleError, match="must have 4 blocks, as the model, got 3"):
        lp.compare_latency(model, IMAGES, {"dense": None, "x": ("pomt", lp.Schedule([0, 1, 0]))}, verbose=False)
    assert not any(map(is_patched_module, model.modules()))


def test_counts_tokens_of_the_images_at_hand():
    model = tiny_vit(dynamic_img_size=True, reg_tokens=2)
    transformer = lp.patching.find_vision_transformer(model)
    assert transformer.count_tokens(torch.zeros(1, 3, 48, 32)) == 6 * 4 + 3


@pytest.mark.parametrize(
    ("block", "depth", "index"), [(0.25, 12, 3), (0.25, 24, 6), (0.0, 12, 0), (0.99, 12, 11), (7, 12, 7)]
)
def test_resolve_block(block, depth, index):
    assert resolve_block(block, depth) == index


@pytest.mark.parametrize("block", [12, -1, 1.0, -0.1, True, "3"])
def test_resolve_block_refuses(block):
    with pytest.raises(lp.ArgumentError, match=r"`block` must be an index from 0 to 11 or a fraction in \[0, 1\)"):
        resolve_block(block, 12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"example_inputs": torch.zeros(3, 32, 32)}, r"`example_inputs` must be images .* got \(3, 32, 32\)"),
        ({"example_inputs": [1]}, r"`example_inputs` must be images .* got list"),
        ({"time_limit": 0}, "`time_limit` must be a number > 0, got 0"),
        ({"protocol": "mine"}, "`protocol` must be 'deployed' or 'paper', got 'mine'"),
        ({"method": "pomt", "counts": [2]}, "`counts` must lie between 3 and 17, got 2"),
        ({"method": "pompt"}, "Did you mean 'pomt'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(lp.ArgumentError, match=message):
        lp.profile_latency(tiny_vit(), **{"example_inputs": IMAGES, "verbose": False, **arguments})


def test_a_patched_model_is_not_measured():
    model = tiny_vit()
    with lp.patch(model, "pomt", [0, 4, 0, 0]) as handle:
        with pytest.raises(lp.ArgumentError, match="`model` must be dense, got a patched model"):
            lp.profile_latency(model, IMAGES, verbose=False)
        assert handle.active


def test_images_that_the_transformer_cannot_take():
    with pytest.raises(lp.ArgumentError, match=r"`images` must be .* got \(2, 3, 24, 24\).*`images_from_batch`"):
        lp.profile_latency(tiny_vit(), IMAGES[:, :, :24, :24], verbose=False)


def test_every_run_under_autocast_casts_the_weights():
    """As every step of a loop does; a cache that outlives one run would make all but the first too fast."""
    casts = []
    with torch.autocast("cpu", torch.bfloat16):
        model = tiny_vit()
        before_forward(model.blocks[0].mlp, lambda *_: casts.append(None))
        cleared = []
        original = torch.clear_autocast_cache
        torch.clear_autocast_cache = lambda: (cleared.append(None), original())
        try:
            lp.profile_latency(model, IMAGES, counts=[9], time_limit=0.1, verbose=False)
        finally:
            torch.clear_autocast_cache = original
    assert len(cleared) >= 2 * (len(casts) - 1)  # before and after all runs but the one that counts tokens


def test_compare_latency_without_a_limit():
    variants = {"dense": None, "pomt": ("pomt", lp.Schedule.single(4, 1, 6))}
    timings = lp.compare_latency(tiny_vit(), IMAGES, variants, rounds=2, time_limit=None, verbose=False)
    assert timings["pomt"].rounds == 2


@pytest.mark.parametrize("runtime", ["torch", "torch.compile", "torch.compile:mode=blocks"])
def test_the_runtime_is_applied_while_it_is_measured(runtime, monkeypatch):
    compiled = []

    def compile_eagerly(self, mode=None, **kwargs):
        compiled.append(self)
        self._compiled_call_impl = torch.compile(self._call_impl, backend="eager", **kwargs)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    model = tiny_vit()
    profile = lp.profile_latency(model, IMAGES, counts=[9], runtime=runtime, time_limit=0.1, verbose=False)
    assert profile.context["runtime"] == runtime
    assert profile.context["compiled"] == (runtime != "torch")
    assert len(compiled) == {"torch": 0, "torch.compile": 1, "torch.compile:mode=blocks": len(model.blocks)}[runtime]
    assert not is_compiled(model)
    schedule = lp.Schedule.single(len(model.blocks), 1, 5)
    lp.compare_latency(
        model, IMAGES, {"dense": None, "pomt": ("pomt", schedule)}, rounds=1, runtime=runtime, verbose=False
    )
    assert not is_compiled(model)


def test_an_unknown_runtime_is_refused():
    with pytest.raises(lp.ArgumentError, match=r"`runtime` must be one of 'torch', .* got 'torhc'"):
        lp.profile_latency(tiny_vit(), IMAGES, runtime="torhc", verbose=False)
