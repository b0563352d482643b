"""The inference plan against the plain module, and the operator that executes it."""

import copy
import pickle
import sys
import threading

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.utils import prune as prune_module

from lift_fast import LiFT, clear_plans
from lift_fast.ops.lift_forward import cache as plan_cache
from lift_fast.ops.lift_forward.op import lift_forward
from lift_fast.ops.lift_forward.plan import build_plan, compose_upsample, weight_names
from lift_fast.testing import AWKWARD_GRIDS, randomize, relative_error

# (C, patch, H, W, options): both patch sizes, patch 14, both published widths, odd and one-token grids, variants.
CASES = [
    (384, 16, 96, 64, {}),
    (384, 8, 40, 56, {}),
    (768, 16, 48, 80, {}),
    (768, 8, 24, 24, {}),
    (384, 14, 70, 42, {}),
    (384, 16, 16, 16, {}),
    (384, 8, 8, 8, {}),
    (7, 8, 30, 41, {}),
    (33, 16, 17, 100, {}),
    (32, 16, 48, 64, {"use_image": False}),
    (32, 8, 24, 40, {"extra_image_blocks": 1, "image_channels": 24}),
]


def network(channels, patch, seed, **options):
    torch.manual_seed(seed)
    return randomize(LiFT(channels, patch, **options), seed).eval()


def inputs(patch, height, width, channels, batch=2):
    return torch.randn(batch, 3, height, width), torch.randn(batch, (height // patch) * (width // patch), channels)


def plain(lift, imgs, x, dtype):
    twin = copy.deepcopy(lift).to(dtype)
    twin.fused = False
    with torch.no_grad():
        return twin(imgs.to(dtype), x.to(dtype))


@pytest.mark.parametrize(("channels", "patch", "height", "width", "options"), CASES)
def test_plan_equals_the_plain_module(channels, patch, height, width, options):
    seed = int(torch.randint(1 << 30, ()))
    lift = network(channels, patch, seed, **options)
    imgs, x = inputs(patch, height, width, channels)
    exact = plain(lift, imgs, x, torch.float64)
    with torch.no_grad():
        assert relative_error(copy.deepcopy(lift).double()(imgs.double(), x.double()), exact) < 1e-13, seed
        assert relative_error(lift(imgs, x), exact) <= 1e-5, seed
        for dtype, limit in ((torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
            ours = relative_error(copy.deepcopy(lift).to(dtype)(imgs.to(dtype), x.to(dtype)), exact)
            theirs = relative_error(plain(lift, imgs, x, dtype), exact)
            # The direct plan stays near the plain graph's own rounding; Winograd kernels may double it.
            assert ours <= min(limit, 3 * theirs + 1e-4), (dtype, ours, theirs, seed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_that_the_processor_lacks_is_rounded_once(dtype, monkeypatch):
    monkeypatch.setattr("lift_fast.ops.lift_forward.op.cpu_computes", lambda dtype: dtype == torch.float32)
    lift = network(8, 8, seed=3).to(dtype)
    imgs, x = (t.to(dtype) for t in inputs(8, 24, 16, 8))
    with torch.no_grad():
        ours = lift(imgs, x)
        # The weights as they are, but float32 arithmetic between them.
        exact = copy.deepcopy(lift).float()(imgs.float(), x.float())
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("grid", AWKWARD_GRIDS)
def test_composed_upsample_equals_the_two_layers(grid):
    generator = torch.Generator().manual_seed(grid[0] * 100 + grid[1])

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    conv, up_weight, up_bias, coarse = random(4, 3, 3, 3), random(5, 3, 2, 2), random(3), random(1, 5, *grid)
    expected = F.conv2d(F.conv_transpose2d(coarse, up_weight, up_bias, stride=2), conv, padding=1)
    phase = compose_upsample(conv, up_weight, up_bias)
    padded = F.pad(torch.cat([coarse, torch.ones_like(coarse[:, :1])], 1), (1, 1, 1, 1))
    h, w = grid
    actual = torch.full_like(expected, torch.nan)
    for a in (0, 1):
        for b in (0, 1):
            window = padded[:, :, a : a + h + 1, b : b + w + 1]
            actual[:, :, a::2, b::2] = F.conv2d(window, phase[a, b].permute(3, 2, 0, 1))
    assert relative_error(actual, expected) < 1e-13


def test_composition_is_differentiable():
    arguments = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 2, 3, 3), (3, 2, 2, 2), (2,))]
    assert torch.autograd.gradcheck(compose_upsample, arguments)


def test_edge_bias_is_the_share_of_the_ones_channel():
    lift = network(6, 8, seed=1)
    weights, epsilons = lift._plan_sources()
    plan = build_plan(weights, epsilons, lift.architecture)
    up_bias, conv = (
        lift.up1.up.bias.double(),
        lift.up1.conv_1.double_conv[0].weight.double()[:, : lift.up1.up.weight.shape[1]],
    )
    norm = lift.up1.conv_1.double_conv[1].double()
    constant = up_bias.view(1, -1, 1, 1).expand(1, -1, 3, 3)
    with torch.no_grad():
        expected = norm(F.conv2d(constant, conv, padding=1))[0].permute(1, 2, 0)
    assert relative_error(plan.edge_bias(), expected) < 1e-13


def test_weight_names_are_the_state_dict_entries():
    for options in ({}, {"use_image": False}, {"extra_image_blocks": 2}):
        lift = LiFT(6, 8, **options)
        state = lift.state_dict(keep_vars=True)
        names = weight_names(lift.architecture)
        assert sorted(names) == sorted(name for name in state if not name.endswith("num_batches_tracked"))
        assert all(state[name] is weight for name, weight in zip(names, lift._plan_sources()[0], strict=True))


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
    # ``.data`` bypasses the version counters; switching modes looks again all the same.
    lift.outc.bias.data.add_(1)
    lift.eval()
    check()
    lift.double().float()
    check()


class Wrapper(torch.nn.Module):
    """Around a part of the network: answers to that part's names, as wrappers for sharding and compiling do."""

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

        # Forgotten, so that all threads look at the layers at once.
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
        # No version counts this, and the address stays.
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


class Functions(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Dispatches(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Pictures(torch.Tensor):
    pass


def test_the_dispatcher_has_its_part_where_somebody_looks(monkeypatch):
    lift = network(8, 8, seed=18)
    imgs, x = inputs(8, 24, 16, 8)
    operator = sys.modules[lift_forward.__module__]
    undisturbed, answers = operator._undisturbed, []
    monkeypatch.setattr(operator, "_undisturbed", lambda *given: answers.append(undisturbed(*given)) or answers[-1])

    def dispatched(*given):
        lift(*given)
        return not answers[-1]

    with torch.no_grad():
        assert not dispatched(imgs, x)
        for watcher in (Functions(), Dispatches(), torch.profiler.profile()):
            with watcher:
                assert dispatched(imgs, x), watcher
        assert dispatched(imgs.as_subclass(Pictures), x)
        assert dispatched(imgs, x.as_subclass(Pictures))
        seen = []
        torch.func.vmap(lambda one: seen.append(dispatched(imgs, x)) or one)(x)
        assert seen == [True]
        lift.outc.weight = torch.nn.Parameter(lift.outc.weight.as_subclass(Pictures))
        assert isinstance(lift.outc.weight, Pictures)
        assert dispatched(imgs, x)


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


def test_autocast_computes_in_its_dtype():
    lift = network(16, 8, seed=8)
    imgs, x = inputs(8, 32, 24, 16)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        fused = lift(imgs, x)
        lift.fused = False
        direct = lift(imgs, x)
    assert fused.dtype == direct.dtype == torch.bfloat16
    assert relative_error(fused, direct) < 2e-2


def test_layouts_of_the_inputs_do_not_matter():
    lift = network(8, 8, seed=9)
    imgs, x = inputs(8, 24, 40, 8)
    strided = torch.randn(2, 15, 16)[:, :, ::2].copy_(x)
    with torch.no_grad():
        expected = lift(imgs, x)
        torch.testing.assert_close(lift(imgs.to(memory_format=torch.channels_last), strided), expected)
        torch.testing.assert_close(lift(imgs.flip(0).flip(0), x), expected)
    assert expected.is_contiguous()


def operator_arguments(seed, dtype=torch.float32, **options):
    lift = network(8, 8, seed=seed, **options)
    weights, epsilons = lift._plan_sources()
    weights = [weight.detach() for weight in weights]
    return (
        torch.randn(2, 3, 24, 16, dtype=dtype),
        torch.randn(2, 3, 2, 8, dtype=dtype),
        weights,
        epsilons,
        *lift.architecture,
    )


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(("channels", "patch"), [(2, 8), (7, 8), (64, 16)])
def test_basis_and_normalized_outputs(channels, patch, native, monkeypatch):
    monkeypatch.setenv("LIFT_FAST_DISABLE_NATIVE", "0" if native else "1")
    lift = network(channels, patch, seed=channels)
    imgs, x = inputs(patch, 3 * patch, 2 * patch, channels)
    exact = plain(lift, imgs, x, torch.float64).flatten(0, 1)
    operands = (imgs, x.view(2, 3, 2, channels), *lift._plan_sources(), lift.architecture)
    with torch.no_grad():
        unit = lift_forward(*operands, normalize=True)
        basis = lift_forward(*operands, basis=True)
        both = lift_forward(*operands, basis=True, normalize=True)
    directions = F.normalize(exact, dim=-1)
    assert relative_error(unit.flatten(0, 2), directions) <= 1e-5
    for actual, expected in ((basis, exact), (both, directions)):
        # Identity 3: coordinates in an orthonormal basis of the span have the same products and norms.
        assert actual.shape == (2, 6, 4, channels // 2 + 1)
        assert actual.is_contiguous()
        rows = actual.flatten(0, 2).double()
        assert relative_error(rows @ rows.T, expected @ expected.T) <= 2e-5


def test_basis_is_orthonormal_coordinates():
    lift = network(64, 8, seed=3)
    plan = build_plan(*lift._plan_sources(), lift.architecture)
    ours = plan.in_basis()
    wide = torch.cat([plan.out, plan.out_bias[None]])
    narrow = torch.cat([ours.out, ours.out_bias[None]])
    assert narrow.shape == (33, 33)
    assert relative_error(narrow @ narrow.T, wide @ wide.T) < 1e-13
    # The same weights give the same coordinates whatever signs the decomposition chose.
    assert bool((narrow.diagonal() >= 0).all())


def test_opcheck():
    for seed, dtype in enumerate((torch.float32, torch.bfloat16)):
        arguments = operator_arguments(seed, dtype)
        for flags in ((), (True, False), (True, True)):
            torch.library.opcheck(torch.ops.lift_fast.lift_forward.default, (*arguments, *flags))


def test_compile_full_graph_follows_weights_without_recompiling():
    lift = network(8, 8, seed=10)
    imgs, x = inputs(8, 24, 16, 8)
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lift, fullgraph=True, backend=backend, dynamic=False)
    with torch.no_grad():
        torch.testing.assert_close(compiled(imgs, x), lift(imgs, x))
        lift.outc.bias.add_(1)
        torch.testing.assert_close(compiled(imgs, x), lift(imgs, x))
        compiled(imgs + 1, x)
    assert len(graphs) == 1
    assert any("lift_forward" in str(node.target) for node in graphs[0].graph.nodes)


@pytest.mark.slow
def test_compile_with_inductor():
    lift = network(8, 8, seed=11)
    imgs, x = inputs(8, 24, 16, 8)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(lift, fullgraph=True)(imgs, x), lift(imgs, x))


def test_fake_tensors_pass_through():
    with torch._subclasses.FakeTensorMode():
        lift = LiFT(8, 16).train().eval()
        with torch.no_grad():
            out = lift(torch.empty(2, 3, 48, 32), torch.empty(2, 6, 8))
    assert out.shape == (2, 24, 8)


def test_export():
    lift = network(8, 14, seed=12)
    imgs, x = inputs(14, 28, 42, 8)
    with torch.no_grad():
        program = torch.export.export(lift, (imgs, x))
        torch.testing.assert_close(program.module()(imgs, x), lift(imgs, x))
    assert set(program.state_dict) == set(lift.state_dict())


def test_a_pytorch_that_does_not_say_who_watches_goes_through_the_dispatcher(monkeypatch):
    module = sys.modules["lift_fast.ops.lift_forward.op"]
    calls, packet = [], torch.ops.lift_fast.lift_forward
    real = packet.default
    monkeypatch.setattr(packet, "default", lambda *given: calls.append(1) or real(*given))
    lift = network(16, 8, 0).requires_grad_(False)
    pictures, x = inputs(8, 16, 24, 16)
    direct = lift(pictures, x)
    assert calls == []
    monkeypatch.delattr(torch._C, "_len_torch_function_stack")
    assert module._watchers() is None
    monkeypatch.setattr(module, "_WATCHERS", None)
    assert torch.equal(lift(pictures, x), direct)
    assert calls == [1]
