import re
from math import ceil

import pytest
import torch

import lightning_prune as lp
from helpers.models import tiny_hugging_face_vit, tiny_torchvision_vit, tiny_vit
from lightning_prune.profiling import SimulatedClock, SimulatedDevice, Workload, simulate_latency
from lightning_prune.profiling.simulation import simulated_seconds


def waves(rows, columns, device):
    """Counted, tile by tile."""
    tiles = sum(1 for _ in range(0, rows, device.tile) for _ in range(0, columns, device.tile))
    return sum(1 for _ in range(0, tiles, device.multiprocessors))


@pytest.mark.parametrize("tokens", [1, 64, 65, 197])
@pytest.mark.parametrize("batch", [1, 3])
def test_time_is_that_of_the_waves(tokens, batch):
    device = SimulatedDevice(multiprocessors=5, tile=64, gigaflops=10.0, launch=0.0)
    work = Workload(batch, 1, 32, 2, ((32, 96), (32, 32)), ((32, 128), (128, 32)))
    wave = 2 * 64 * 64 / 10e9  # seconds, of one multiplication deep
    shapes = ((32, 96), (32, 32), (32, 128), (128, 32))
    expected = sum(waves(batch * tokens, outputs, device) * wave * inputs for inputs, outputs in shapes)
    tiles = batch * 2 * ceil(tokens / 64)
    expected += ceil(tiles / 5) * 2 * 2 * 64 * tokens * 16 / 10e9  # scores and weighted values, of heads 16 wide
    assert device.seconds(work, [tokens]) == pytest.approx(expected)


def test_no_kernel_takes_less_than_its_launch():
    device = SimulatedDevice(multiprocessors=1000, gigaflops=1e9, launch=1e-5)
    work = Workload.plain(batch=1, depth=2)
    assert device.seconds(work, [197] * 2) == device.seconds(work, [20] * 2) == pytest.approx(2 * 9 * 1e-5)


def test_reducing_block_has_an_overhead():
    device = SimulatedDevice(multiprocessors=1000, gigaflops=1e9, launch=1e-5)
    work = Workload.plain(batch=1, depth=2)
    assert device.seconds(work, [197, 197], [197, 100]) > device.seconds(work, [197, 197])


@pytest.mark.parametrize("depth", [2, 3])
def test_workload_is_read_from_the_blocks_of_any_family(depth):
    plain = Workload(7, depth, 32, 2, ((32, 96), (32, 32)), ((32, 128), (128, 32)))
    timm_blocks = lp.patching.find_vision_transformer(tiny_vit(depth=depth)).blocks
    assert Workload.of(timm_blocks, 7) == plain
    model = tiny_torchvision_vit(depth, mlp=128)
    assert Workload.of(lp.patching.find_vision_transformer(model).blocks, 7) == plain
    assert Workload.plain(7, depth, 32, 2) == plain
    model = tiny_hugging_face_vit(num_hidden_layers=depth, intermediate_size=128)
    separate = plain._replace(attention=((32, 32),) * 4)  # queries, keys and values are products of their own
    assert Workload.of(lp.patching.find_vision_transformer(model).blocks, 7) == separate


def test_blocks_without_heads_or_weights_are_refused():
    block = tiny_vit().blocks[0]
    del block.attn.num_heads
    with pytest.raises(lp.ArgumentError, match="A Block cannot be simulated: its attention has no num_heads"):
        Workload.of([block], 1)
    with pytest.raises(lp.ArgumentError, match=r"A LayerNorm cannot be simulated: .* attention"):
        Workload.of([torch.nn.LayerNorm(4)], 1)
    block.mlp = torch.nn.Identity()
    with pytest.raises(lp.ArgumentError, match=r"A Block cannot be simulated: .* MLP"):
        Workload.of([block], 1)


def test_noise_drift_and_spikes_are_those_asked_for():
    def times(**kwargs):
        clock, found = SimulatedClock(SimulatedDevice(**kwargs)), []
        for _ in range(4000):
            before = clock()
            clock.spend(0.01)
            found.append(clock() - before)
        return torch.tensor(found)

    assert torch.allclose(times(), torch.tensor(0.01))
    assert times(noise=0.05).log().std() == pytest.approx(0.05, rel=0.1)
    drifting = times(drift=0.1)
    assert drifting.max() == pytest.approx(0.011, rel=1e-3)
    assert drifting.min() == pytest.approx(0.010, rel=1e-3)
    assert (times(spikes=0.1) > 0.0101).float().mean() == pytest.approx(0.1, abs=0.02)
    assert torch.equal(times(noise=0.05, seed=1), times(noise=0.05, seed=1))
    assert not torch.equal(times(noise=0.05, seed=1), times(noise=0.05, seed=2))


def test_parse_is_the_inverse_of_str():
    device = SimulatedDevice(multiprocessors=132, tile=128, launch=2e-6, noise=0.01)
    assert SimulatedDevice.parse(str(device)) == device
    assert str(device) == "simulated:multiprocessors=132,tile=128,launch=2e-06,noise=0.01"
    assert SimulatedDevice.parse("simulated:") == SimulatedDevice()


@pytest.mark.parametrize(
    "exact",
    [{"seed": 1234567}, {"gigaflops": 1234567.5}, {"multiprocessors": 1000001}, {"launch": 1.23456789e-6}],
)
def test_text_of_a_device_keeps_all_digits(exact):
    device = SimulatedDevice(**exact)
    assert SimulatedDevice.parse(str(device)) == device


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"multiprocessors": 1.5}, "`multiprocessors` of a simulated device must be a whole number, got 1.5"),
        ({"tile": True}, "`tile` of a simulated device must be a whole number, got True"),
        ({"noise": "2%"}, "`noise` of a simulated device must be a number, got '2%'"),
    ],
)
def test_numbers_out_of_range_are_refused(wrong, message):
    with pytest.raises(lp.ArgumentError, match=message):
        SimulatedDevice(**wrong)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cuda", "`device` must begin with 'simulated:', got 'cuda'"),
        ("simulated:tiles=4", "must be one of multiprocessors, tile, .* got 'tiles'"),
        ("simulated:tile=big", "`tile` of a simulated device must be a whole number, got 'big'"),
        ("simulated:tile=1.5", "`tile` of a simulated device must be a whole number, got '1.5'"),
        ("simulated:tile", "`tile` of a simulated device must be a whole number, got ''"),
        ("simulated:multiprocessors=1e3", "`multiprocessors` of a simulated device must be a whole number, got '1e3'"),
        ("simulated:launch=soon", "`launch` of a simulated device must be a number, got 'soon'"),
        ("simulated:tile=4,tile=8", "`tile` of a simulated device must be given once, got 'simulated:tile=4,tile=8'"),
        ("simulated:launch=inf", "`launch` of a simulated device must be finite, got inf"),
        ("simulated:drift=inf", "`drift` of a simulated device must be finite, got inf"),
        ("simulated:tile=0", "`tile` of a simulated device must be > 0, got 0"),
        ("simulated:noise=-1", "`noise` of a simulated device must be >= 0, got -1"),
        ("simulated:spikes=1", re.escape("`spikes` of a simulated device must be in [0, 1), got 1")),
        ("simulated:gigaflops=nan", "`gigaflops` of a simulated device must be finite, got nan"),
    ],
)
def test_parse_refuses(text, message):
    with pytest.raises(lp.ArgumentError, match=message):
        SimulatedDevice.parse(text)


def test_profile_of_a_model_is_the_exact_time_of_its_schedules():
    model, device = tiny_vit(depth=3), SimulatedDevice(multiprocessors=2, tile=4)
    images = torch.zeros(2, 3, 32, 32)
    profile = simulate_latency(model, images, device, method="pomt", block=1)
    work = Workload.of(model.blocks, 2)
    for count in profile.tokens:
        exact = simulated_seconds(device, work, lp.Schedule.single(3, 1, 17 - count), 17)
        assert profile.latency_ms(count) == pytest.approx(1e3 * exact)
    assert (profile.dense_tokens, profile.context["device"]) == (17, str(device))
    assert profile.context["device_type"] == "simulated"


def test_a_method_that_acts_on_the_input_leaves_all_blocks_the_same_tokens():
    model, device = tiny_vit(depth=3), SimulatedDevice(multiprocessors=2, tile=4)
    profile = simulate_latency(model, torch.zeros(2, 3, 32, 32), device, method=lp.reduction.RandomDrop(site="input"))
    work = Workload.of(model.blocks, 2)
    for count in profile.tokens:
        assert profile.latency_ms(count) == pytest.approx(1e3 * device.seconds(work, [count] * 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"time_limit": 0}, "`time_limit` must be a number > 0, got 0"),
        ({"time_limit": None}, "`time_limit` must be a number > 0, got None"),
        ({"time_limit": "3"}, "`time_limit` must be a number > 0, got '3'"),
        ({"example_inputs": torch.zeros(3, 32, 32)}, r"`example_inputs` must be images .* got \(3, 32, 32\)"),
        ({"example_inputs": torch.zeros(0, 3, 32, 32)}, r"`example_inputs` must be images .* got \(0, 3, 32, 32\)"),
        ({"example_inputs": None}, "`example_inputs` must be images .* got NoneType"),
        ({"device": "simulated:"}, "`device` must be a SimulatedDevice, got 'simulated:'"),
        (
            {"device": SimulatedDevice(gigaflops=1e-310)},
            "`device` must run the model in .* by simulated:gigaflops=1e-310",
        ),
    ],
)
def test_simulate_refuses(arguments, message):
    given = {"example_inputs": torch.zeros(1, 3, 32, 32), "device": SimulatedDevice(), **arguments}
    with pytest.raises(lp.ArgumentError, match=message):
        simulate_latency(tiny_vit(), **given)


def test_a_patched_model_is_not_simulated():
    model = tiny_vit()
    with (
        lp.patch(model, "pomt", [0, 4, 0, 0]),
        pytest.raises(lp.ArgumentError, match="`model` must be dense, got a patched model"),
    ):
        simulate_latency(model, torch.zeros(1, 3, 32, 32), SimulatedDevice())


def test_methods_that_leave_some_counts_only():
    """Of 4 x 4 patches: the grids that images can be scaled to."""
    model, images = tiny_vit(), torch.randn(2, 3, 32, 32)
    device = SimulatedDevice(multiprocessors=9, tile=16)
    profile = simulate_latency(model, images, device, method="resize")
    assert {*profile.tokens} <= {2, 3, 5, 7, 10, 13, 17}
    assert len(profile.tokens) > 3
    measured = lp.profile_latency(model, images, method="resize", counts=[10, 13], time_limit=0.1, verbose=False)
    assert measured.tokens == (10, 13, 17)
    with pytest.raises(lp.ArgumentError, match=r"`counts` .* \[13, 10\], got 12"):
        lp.profile_latency(model, images, method="resize", counts=[10, 12], time_limit=0.1, verbose=False)
