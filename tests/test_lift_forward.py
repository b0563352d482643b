"""The inference plan against the plain module, and the operator that runs it."""

import copy
import sys

import pytest
import torch
from lift_networks import inputs, network, plain
from torch.nn import functional as F

from lift_fast import LiFT
from lift_fast.ops.lift_forward.op import lift_forward
from lift_fast.ops.lift_forward.plan import build_plan, compose_upsample, weight_names
from lift_fast.testing import AWKWARD_GRIDS, relative_error

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
        # The same rounded weights with float32 arithmetic.
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


class Functions(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Dispatches(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Images(torch.Tensor):
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
        assert dispatched(imgs.as_subclass(Images), x)
        assert dispatched(imgs, x.as_subclass(Images))
        seen = []
        torch.func.vmap(lambda one: seen.append(dispatched(imgs, x)) or one)(x)
        assert seen == [True]
        lift.outc.weight = torch.nn.Parameter(lift.outc.weight.as_subclass(Images))
        assert isinstance(lift.outc.weight, Images)
        assert dispatched(imgs, x)


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
    imgs, x = inputs(8, 16, 24, 16)
    direct = lift(imgs, x)
    assert calls == []
    monkeypatch.delattr(torch._C, "_len_torch_function_stack")
    assert module._watchers() is None
    monkeypatch.setattr(module, "_WATCHERS", None)
    assert torch.equal(lift(imgs, x), direct)
    assert calls == [1]
