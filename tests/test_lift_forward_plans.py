"""When an inference plan is built, reused and dropped, and when the plain graph runs instead."""

import copy
import pickle
import threading

import pytest
import torch
from lift_networks import inputs, network, plain
from torch.autograd import forward_ad
from torch.nn.utils import prune as prune_module

from lift_fast import clear_plans
from lift_fast.ops.lift_forward import cache as plan_cache
from lift_fast.testing import relative_error


@pytest.fixture
def built(monkeypatch):
    """Counts how often a plan is built."""
    clear_plans()
    calls = []
    build = plan_cache.build_plan
    monkeypatch.setattr(plan_cache, "build_plan", lambda *a: calls.append(1) or build(*a))
    return calls


def test_plan_is_built_once_and_again_after_any_change(built):
    lift = network(8, 8, seed=2)
    imgs, x = inputs(8, 24, 16, 8)
    with torch.no_grad():
        for _ in range(3):
            lift(imgs, x)
        assert len(built) == 1
        for number, (name, tensor) in enumerate(lift.state_dict().items(), start=2):
            if name.endswith("num_batches_tracked"):
                continue
            before = lift(imgs, x)
            tensor.mul_(1.5).add_(0.1)
            after = lift(imgs, x)
            assert not torch.equal(before, after), f"a change of {name} (number {number}) went unnoticed"
            assert relative_error(after, plain(lift, imgs, x, torch.float64)) < 1e-5, name


def test_plan_follows_loading_training_and_replacement(built):
    lift = network(8, 8, seed=3)
    other = network(8, 8, seed=4)
    imgs, x = inputs(8, 24, 16, 8)

    def check():
        with torch.no_grad():
            assert relative_error(lift(imgs, x), plain(lift, imgs, x, torch.float64)) < 1e-5

    check()
    lift.load_state_dict(other.state_dict())
    check()
    optimizer = torch.optim.SGD(lift.parameters(), lr=0.1)
    lift.train()(imgs, x).square().mean().backward()
    optimizer.step()
    lift.eval()
    check()
    lift.outc = torch.nn.Conv2d(4, 8, 1)
    check()
    lift.up1.conv_1.double_conv[1].eps = 0.5
    check()
    # ``.data`` bypasses the version counters; switching modes still rebuilds the plan.
    lift.outc.bias.data.add_(1)
    lift.eval()
    check()
    lift.double().float()
    check()


class Wrapper(torch.nn.Module):
    """Wraps a part of the network and forwards its attributes, as wrappers for sharding and compiling do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)

    def __getitem__(self, index):
        return self.inner[index]

    def __len__(self):
        return len(self.inner)

    def forward(self, *args):
        return self.inner(*args)


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


def replace_memory(lift):
    lift.outc.bias.data = torch.randn(8)


def parametrize(lift):
    torch.nn.utils.parametrize.register_parametrization(lift.up1.up, "weight", Doubled())


def prune(lift):
    prune_module.l1_unstructured(lift.up1.conv_1.double_conv[3], "weight", 0.5)


def transpose(lift):
    # Same memory, same address, same version.
    conv = lift.up1.conv_1.double_conv[3]
    conv.weight = torch.nn.Parameter(conv.weight.transpose(2, 3))


def wrap(name):
    def change(lift):
        setattr(lift, name, Wrapper(getattr(lift, name)))
        with torch.no_grad():
            lift.state_dict()[f"{name}.inner." + {"up1": "up.bias", "outc": "bias"}.get(name, "0.bias")].add_(1)

    return change


@pytest.mark.parametrize(
    "change",
    [replace_memory, transpose, parametrize, prune, *map(wrap, ("up1", "outc", "image_convs_1"))],
    ids=["memory", "transposed", "parametrized", "pruned", "wrapped up1", "wrapped outc", "wrapped image_convs_1"],
)
def test_plan_follows_however_the_weights_are_held(change):
    lift = network(8, 8, seed=13)
    imgs, x = inputs(8, 24, 16, 8)
    with torch.no_grad():
        before = lift(imgs, x)
        change(lift)
        after = lift(imgs, x)
        lift.fused = False
        assert relative_error(after, lift(imgs, x)) < 1e-5
    assert relative_error(after, before) > 1e-3


def gelu(lift):
    lift.up1.conv_1.double_conv[2] = torch.nn.GELU()


def bias(lift):
    lift.up1.conv_1.double_conv[0].bias = torch.nn.Parameter(torch.randn(4))


def further_layer(lift):
    lift.image_convs_1.append(torch.nn.AvgPool2d(3, 1, 1))


def padding_mode(lift):
    for module in lift.modules():
        if type(module) is torch.nn.Conv2d:
            module.padding_mode = "circular"


def dilation(lift):
    conv = lift.up1.conv_1.double_conv[3]
    conv.dilation, conv.padding = (2, 2), (2, 2)


def pool(lift):
    lift.scale_adapter = torch.nn.AvgPool2d(2, 2)


def no_affine(lift):
    lift.up1.conv_1.double_conv[1] = torch.nn.BatchNorm2d(4, affine=False)


def no_affine_in_place(lift):
    norm = lift.up1.conv_1.double_conv[1]
    norm.weight = norm.bias = None


def no_statistics(lift):
    norm = lift.image_convs_1[1]
    norm.running_mean = norm.running_var = None


def no_bias(lift):
    lift.outc.bias = None


def own_forward(lift):
    inner = lift.up1.forward
    lift.up1.forward = lambda x, fine: 2 * inner(x, fine)


def own_forward_of_a_layer(lift):
    conv = lift.outc
    conv.forward = lambda x: torch.nn.Conv2d.forward(conv, x) + 1


class Louder(torch.nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def own_class(lift):
    lift.outc.__class__ = Louder


def another_sequence(lift):
    lift.image_convs_2 = torch.nn.Sequential(lift.image_convs_2, torch.nn.Tanh())


def pool_in_place(lift):
    lift.scale_adapter.kernel_size, lift.scale_adapter.padding = 3, 1


def spectral(lift):
    torch.nn.utils.spectral_norm(lift.outc, n_power_iterations=3)


def pruned_by_a_hook(lift):
    prune_module.identity(lift.outc, "weight")
    lift.outc.weight_orig.mul_(0.5)


def hook(lift):
    lift.outc.register_forward_hook(lambda module, given, out: 2 * out)


def hook_of_a_block(lift):
    lift.up1.register_forward_pre_hook(lambda module, given: (2 * given[0], given[1]))


def own_forward_in_place_of_another_attribute(lift):
    lift.outc.tag = 1
    lift.eval()
    with torch.no_grad():
        lift(*inputs(16, 48, 32, 8))
    del lift.outc.tag
    own_forward_of_a_layer(lift)


EDITS = [
    *(pool_in_place, spectral, pruned_by_a_hook, hook, hook_of_a_block, own_forward_in_place_of_another_attribute),
    *(gelu, bias, further_layer, padding_mode, dilation, pool, no_affine, no_affine_in_place, no_statistics, no_bias),
    *(own_forward, own_forward_of_a_layer, own_class, another_sequence),
]


@pytest.mark.parametrize("when", ["before", "between"])
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_an_edited_network_runs_as_it_stands(edit, when):
    lift = network(8, 16, seed=21)
    imgs, x = inputs(16, 48, 32, 8)
    with torch.no_grad():
        original = None
        if when == "between":
            original = lift(imgs, x)
        edit(lift)
        lift.eval()
        ours = lift(imgs, x)
        again = lift(imgs, x)
        lift.fused = False
        expected = lift(imgs, x)
    assert relative_error(ours, expected) < 1e-5
    assert relative_error(again, expected) < 1e-5
    assert original is None or relative_error(ours, original) > 1e-4


def test_a_hook_for_all_modules_is_heard():
    lift = network(8, 16, seed=23)
    imgs, x = inputs(16, 48, 32, 8)
    with torch.no_grad():
        before = lift(imgs, x)
        handle = torch.nn.modules.module.register_module_forward_hook(
            lambda module, given, out: 2 * out if module is lift.outc else None
        )
        try:
            ours = lift(imgs, x)
        finally:
            handle.remove()
        assert relative_error(ours, 2 * before) < 1e-5
        assert torch.equal(lift(imgs, x), before)


def test_a_layer_exchanged_while_other_threads_compute_is_the_new_one_afterwards():
    imgs, x = inputs(16, 48, 32, 8)
    for seed in range(12):
        lift, other = network(8, 16, seed=seed), network(8, 16, seed=seed + 100)

        def compute(lift=lift):
            with torch.no_grad():
                for _ in range(3):
                    lift(imgs, x)

        # Invalidates the cached layers, so that all threads look them up at once.
        lift.scale_adapter = torch.nn.MaxPool2d(2, 2)
        threads = [threading.Thread(target=compute) for _ in range(3)]
        for thread in threads:
            thread.start()
        lift.outc = other.outc
        for thread in threads:
            thread.join()
        with torch.no_grad():
            assert relative_error(lift(imgs, x), plain(lift, imgs, x, torch.float64)) < 1e-5, seed


def test_transforms_of_functions_run_the_plain_graph():
    lift = network(8, 8, seed=24)
    imgs, x = torch.randn(3, 1, 3, 24, 16), torch.randn(3, 1, 6, 8)
    with torch.no_grad():
        wanted = torch.stack([lift(one, tokens) for one, tokens in zip(imgs, x, strict=True)])
        torch.testing.assert_close(torch.func.vmap(lift)(imgs, x), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda lift: pickle.loads(pickle.dumps(lift))])
def test_copies_of_a_network_follow_their_own_edits(copy_of):
    lift = network(8, 16, seed=22)
    imgs, x = inputs(16, 48, 32, 8)
    with torch.no_grad():
        before = lift(imgs, x)
        other = copy_of(lift)
        assert torch.equal(other(imgs, x), before)
        lift.up1.conv_1.double_conv[2] = torch.nn.GELU()
        other.up1.conv_1.double_conv[5] = torch.nn.GELU()
        for one in (lift, other):
            ours, one.fused = one(imgs, x), False
            assert relative_error(ours, one(imgs, x)) < 1e-5
            assert relative_error(ours, before) > 1e-3


def test_plan_notices_memory_that_was_given_out_again():
    lift = network(8, 8, seed=19)
    imgs, x = inputs(8, 24, 16, 8)
    memory = bytearray(32)
    with torch.no_grad():
        lift.outc.bias.data = torch.frombuffer(memory, dtype=torch.float32)
        before, address = lift(imgs, x), lift.outc.bias.data_ptr()
        # The version does not count this, and the address stays.
        lift.outc.bias.data = torch.empty(0)
        lift.outc.bias.data = torch.frombuffer(memory, dtype=torch.float32)
        lift.outc.bias.data.fill_(3)
        assert lift.outc.bias.data_ptr() == address
        torch.testing.assert_close(lift(imgs, x), before + 3)


def test_plan_follows_weights_given_for_one_call():
    lift, other = network(8, 8, seed=14), network(8, 8, seed=15)
    imgs, x = inputs(8, 24, 16, 8)
    with torch.no_grad():
        expected = other(imgs, x)
        lift(imgs, x)
        assert torch.equal(torch.func.functional_call(lift, other.state_dict(), (imgs, x)), expected)


def test_a_layer_made_in_inference_mode_is_noticed():
    lift = network(8, 8, seed=16)
    imgs, x = inputs(8, 24, 16, 8)
    with torch.inference_mode():
        lift(imgs, x)
        lift.outc = torch.nn.Conv2d(4, 8, 1)
        assert relative_error(lift(imgs, x), plain(lift, imgs, x, torch.float64)) < 1e-5


def test_frozen_evaluation_with_gradients_enabled_is_fused(built):
    lift = network(8, 8, seed=17).requires_grad_(False)
    imgs, x = inputs(8, 24, 16, 8)
    assert not lift(imgs, x).requires_grad
    assert len(built) == 1
    lift.outc.bias.requires_grad_(True)
    assert lift(imgs, x).requires_grad
    lift.outc.bias.requires_grad_(False)
    assert lift(imgs, x.requires_grad_()).requires_grad


def test_tangents_go_through_the_plain_graph():
    lift = network(8, 8, seed=18).requires_grad_(False)
    imgs, x = inputs(8, 24, 16, 8)
    direction = torch.randn_like(x)

    def tangent():
        with torch.no_grad(), forward_ad.dual_level():
            alone = forward_ad.unpack_dual(lift(imgs, forward_ad.make_dual(x, direction))).tangent
        return alone, torch.func.jvp(lambda tokens: lift(imgs, tokens), (x,), (direction,))[1]

    lift(imgs, x)
    ours = tangent()
    lift.fused = False
    for one, expected in zip(ours, tangent(), strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(one, expected)


def test_plan_of_inference_tensors_follows_changes():
    with torch.inference_mode():
        lift = network(8, 8, seed=5)
        imgs, x = inputs(8, 16, 16, 8)
        first = lift(imgs, x)
        lift.outc.bias.add_(1)
        torch.testing.assert_close(lift(imgs, x), first + 1)


def test_a_plan_made_in_inference_mode_serves_outside_of_it(built):
    lift = network(8, 8, seed=6)
    imgs, x = inputs(8, 16, 16, 8)
    with torch.inference_mode():
        first = lift(imgs, x)
    with torch.no_grad():
        assert torch.equal(lift(imgs, x), first)
    assert len(built) == 1


def test_plans_of_deleted_networks_are_dropped():
    clear_plans()
    imgs, x = inputs(8, 16, 16, 8)
    with torch.no_grad():
        for seed in range(3):
            network(8, 8, seed=seed)(imgs, x)
    assert len(plan_cache._entries) <= 1 + 1


def test_fused_false_forces_the_plain_graph(built):
    lift = network(8, 8, seed=7)
    lift.fused = False
    with torch.no_grad():
        lift(*inputs(8, 16, 16, 8))
    assert not built


def test_an_empty_submodule_changes_nothing():
    lift = network(8, 16, seed=22).eval()
    imgs, x = inputs(16, 48, 32, 8)
    sources = len(lift._plan_sources()[0])
    lift.register_module("nothing", None)
    with torch.no_grad():
        out = lift(imgs, x)
        assert len(lift._plan_sources()[0]) == sources > 0
        lift.fused = False
        assert relative_error(out, lift(imgs, x)) < 1e-5
