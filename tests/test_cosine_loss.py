"""``cosine_loss``: value and gradient against ``CosineEmbeddingLoss`` in float64, layouts, autograd, errors."""

from __future__ import annotations

import math
import threading
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad

import lift_fast
from lift_fast import CosineLoss, _native, cosine_loss
from lift_fast.losses import LOSSES, cosine_loss_plain, feature_loss
from lift_fast.ops.cosine_loss import op
from lift_fast.testing import AWKWARD_COUNTS

pytestmark = pytest.mark.usefixtures("one_thread")

# Error of the gradient in units of 1 / |prediction|: half a unit in the last place; float32 also rounds sums.
EPS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11 + 2e-6}
REDUCTIONS = ("mean", "sum", "none")


def reference(prediction, target, dim, reduction):
    """Loss and gradient in float64 by permuted copies and ``CosineEmbeddingLoss``."""
    x = prediction.detach().double().requires_grad_()
    channels = x.shape[dim]
    rows = [t.movedim(dim, -1).reshape(-1, channels) for t in (x, target.detach().double())]
    loss = nn.CosineEmbeddingLoss(reduction=reduction)(*rows, torch.ones(len(rows[0])))
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    if reduction == "none":
        loss = loss.view(prediction.movedim(dim, -1).shape[:-1])
    return loss.detach(), gradient


def gradient_error(gradient, expected, prediction, dim, reduction):
    """Largest error of a position's gradient, in units of 1 / |prediction|, which it cannot exceed."""
    norm = (prediction.detach().double().square().sum(dim) + 1e-12).sqrt()
    weight = 1 / norm.numel() if reduction == "mean" else 1
    return float((torch.linalg.vector_norm(gradient.double() - expected, dim=dim) * norm / weight).max())


def check(prediction, target, dim=1, reduction="mean", loss_function=cosine_loss):
    prediction = prediction.detach().requires_grad_()
    loss = loss_function(prediction, target, dim, reduction)
    # As gradient scalers do for float16, where the gradients of the mean would underflow.
    half_mean = prediction.dtype == torch.float16 and reduction == "mean"
    factor = loss.new_tensor(prediction.numel() // prediction.shape[dim] if half_mean else 1)
    (gradient,) = torch.autograd.grad(loss, prediction, factor.expand_as(loss))
    assert gradient.dtype == prediction.dtype
    gradient = gradient.double() / factor if half_mean else gradient
    wanted, slope = reference(prediction, target, dim, reduction)
    assert loss.dtype == (torch.float64 if prediction.dtype == torch.float64 else torch.float32)
    assert loss.shape == wanted.shape
    scale = wanted.numel() if reduction != "sum" else prediction.numel() // prediction.shape[dim]
    tolerance = (1e-13 if prediction.dtype == torch.float64 else 1e-6) * (scale if reduction == "sum" else 1)
    assert (loss.double() - wanted).abs().max() <= tolerance
    assert gradient.shape == prediction.shape
    assert gradient_error(gradient, slope, prediction, dim, reduction) <= EPS[prediction.dtype]
    with torch.no_grad():
        assert torch.equal(loss_function(prediction, target, dim, reduction), loss)
    return gradient


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline", "plain"])
def test_equals_the_embedding_loss(isa, dtype, reduction, monkeypatch):
    module = pytest.importorskip("lift_fast._C")
    if isa == "plain":
        monkeypatch.setenv("LIFT_FAST_DISABLE_NATIVE", "1")
    elif isa not in module.cpu_isas():
        pytest.skip(f"this CPU has no {isa}")
    else:
        monkeypatch.setenv("LIFT_FAST_CPU_ISA", isa)
    for seed, shape in enumerate([(2, 37, 5, 7), (1, 1, 1, 1), (3, 64, 13, 11), (2, 7, 1, 131)]):
        x, y = random(*shape, dtype=dtype, seed=seed), random(*shape, dtype=dtype, seed=seed + 50)
        check(x, y, 1, reduction)
        check(x.to(memory_format=torch.channels_last), y.to(memory_format=torch.channels_last), 1, reduction)
        check(x.flatten(2).transpose(1, 2), y.flatten(2).transpose(1, 2).contiguous(), -1, reduction)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 6) | st.sampled_from([c for c in AWKWARD_COUNTS if c]), min_size=1, max_size=3),
    data=st.data(),
)
def test_any_shape_dimension_and_layout(shape, data):
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    inputs = []
    for seed in range(2):
        order = data.draw(st.permutations(range(len(shape))))
        step = data.draw(st.sampled_from([1, 1, 2]))
        # Laid out in the drawn order, perhaps with gaps.
        laid = random(*(shape[axis] * step for axis in order), dtype=dtype, seed=seed)
        laid = laid[tuple(slice(None, None, step) for _ in order)]
        inputs.append(laid.permute([order.index(axis) for axis in range(len(shape))]))
    check(*inputs, dim, data.draw(st.sampled_from(REDUCTIONS)))


def test_gradient_has_the_memory_format_of_the_prediction():
    x, y = random(2, 16, 5, 3), random(2, 16, 5, 3, seed=1)
    assert check(x, y).is_contiguous()
    last = x.to(memory_format=torch.channels_last)
    assert check(last, y).is_contiguous(memory_format=torch.channels_last)
    assert check(last, y.to(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)
    # A layout that three dimensions cannot describe is copied.
    odd = random(4, 3, 5, 6).permute(2, 1, 3, 0)[:, :, ::2]
    check(odd, random(*odd.shape, seed=2), 1)
    check(random(1, 16, 1, 1).expand(2, 16, 5, 3), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_zero_vectors_have_the_epsilon_of_pytorch(dtype):
    x, y = random(3, 8, 4, dtype=dtype), random(3, 8, 4, dtype=dtype, seed=1)
    x[0, :, 0] = y[1, :, 1] = 0
    x[2, :, 2] = y[2, :, 2] = 0
    x[2, :, 3] *= 1e-6
    check(x, y, 1, "none")


def test_large_and_tiny_vectors_stay_in_range():
    x, y = random(2, 8, 5), random(2, 8, 5, seed=1)
    for scale in (1e15, 1e-8):
        check(x * scale, y * scale, 1, "none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["NCHW", "tokens"])
def test_squares_beyond_the_range(layout, dtype):
    far = 200 if dtype == torch.float64 else 25
    x, y = random(2, 37, 5, dtype=dtype), random(2, 37, 5, dtype=dtype, seed=1)
    # Position 0 stays as it is. Products as large as their squares, and ordinary ones of a long and a short vector.
    x[..., 1], y[..., 1] = x[..., 1] * 10.0**far, y[..., 1] * 10.0**far
    x[..., 2] *= 10.0**far
    y[..., 3] *= 10.0**far
    x[..., 4], y[..., 4] = x[..., 4] * 10.0**far, y[..., 4] * 10.0**-far
    if layout == "tokens":
        x, y = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x, y))
    # Vectors of length one have the same cosine; 1e-25 is below epsilon and has none. Their slope is 1 / length larger.
    lengths = [
        x.double().div(10.0**far).square().sum(1).sqrt() * 10.0**far if i in (1, 2, 4) else None for i in range(5)
    ]
    unit_x, unit_y = x.double().clone(), y.double().clone()
    for i in (1, 2, 4):
        unit_x[..., i] /= lengths[i][..., i, None]
    for i in (1, 3):
        unit_y[..., i] /= 10.0**far
    wanted, slope = reference(unit_x, unit_y, 1, "none")
    x.requires_grad_()
    loss = cosine_loss(x, y, reduction="none")
    assert (loss.double() - wanted).abs().max() < 1e-6
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    scaled = gradient.double().clone()
    for i in (1, 2, 4):
        scaled[..., i] *= lengths[i][..., i, None]
    assert gradient_error(scaled, slope, unit_x, 1, "none") <= EPS[dtype]
    # The plain version agrees, and with a graph for further derivatives.
    torch.testing.assert_close(cosine_loss_plain(x, y, 1, "none"), loss, rtol=0, atol=1e-6)
    (again,) = torch.autograd.grad(cosine_loss(x, y, reduction="none").sum(), x, create_graph=True)
    torch.testing.assert_close(again, gradient, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("length", [1e-7, 1e-5, 1.0, 1e4])
@pytest.mark.parametrize("native", [True, False])
def test_float16_gradients_meet_what_comes_from_above_before_they_are_rounded(native, length, reduction, monkeypatch):
    if not native:
        monkeypatch.setenv("LIFT_FAST_DISABLE_NATIVE", "1")
    x, y = (random(2, 37, 5, seed=s) for s in range(2))
    x, y = (x * length).half(), y.half()
    # Factors that bring the largest gradient to 1; they exceed float16's range or lie far below it.
    _, slope = reference(x, y, 1, reduction)
    above = 1 / slope.abs().max()
    x.requires_grad_()
    loss = cosine_loss(x, y, reduction=reduction)
    for _ in range(2):
        (gradient,) = torch.autograd.grad(loss, x, above.float().expand_as(loss), retain_graph=True)
        assert (gradient.double() - slope * above).abs().max() <= 2**-10
    (plain,) = torch.autograd.grad(cosine_loss_plain(x, y, 1, reduction), x, above.float().expand_as(loss))
    assert (plain.double() - slope * above).abs().max() <= 2**-10
    many = torch.stack([above.float(), 2 * above.float()])
    if reduction != "none":
        (batch,) = torch.autograd.grad(loss, x, many, is_grads_batched=True)
        assert (batch[0].double() - slope * above).abs().max() <= 2**-10
        assert (batch[1].double() - 2 * slope * above).abs().max() <= 2**-9


@pytest.mark.parametrize("layout", ["NCHW", "tokens"])
@pytest.mark.parametrize("channels", [64, 384, 1000])
def test_gradients_of_nearly_parallel_vectors(channels, layout):
    y = random(4, channels, 300)
    for apart in (1e-3, 1e-5, 0.0):
        x = 1.7 * y + apart * random(4, channels, 300, seed=1)
        inputs = [x, y]
        if layout == "tokens":
            inputs = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs]
        # The two terms of the gradient cancel, so the remainder shows how their factors were rounded.
        _, slope = reference(x, y, 1, "none")
        given = inputs[0].requires_grad_()
        (gradient,) = torch.autograd.grad(cosine_loss(given, inputs[1], reduction="none").sum(), given)
        assert gradient_error(gradient, slope, x, 1, "none") < 8e-7


def negative(tensor):
    """The same values as a lazily negated tensor."""
    out = torch.complex(torch.zeros_like(tensor), -tensor).conj().imag
    assert out.is_neg()
    assert torch.equal(out, tensor)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("which", [(True, False), (False, True), (True, True)])
def test_negated_memory(which, dtype):
    x, y = random(2, 6, 4, dtype=dtype), random(2, 6, 4, dtype=dtype, seed=1)
    given = [negative(t) if negate else t for t, negate in zip((x, y), which, strict=True)]
    check(*given)
    prediction = given[0].detach().requires_grad_()
    above = negative(random(2, 4, dtype=dtype, seed=3))
    (gradient,) = torch.autograd.grad(cosine_loss(prediction, given[1], reduction="none"), prediction, above)
    _, slope = reference(x, y, 1, "none")
    torch.testing.assert_close(gradient.double(), slope * above.double()[:, None], rtol=1e-5, atol=1e-6)


def test_not_a_number_stays_in_its_position():
    x, y = random(1, 8, 6), random(1, 8, 6, seed=1)
    x[0, 3, 2], y[0, 1, 4] = torch.nan, torch.inf
    x.requires_grad_()
    loss = cosine_loss(x, y, reduction="none")
    (gradient,) = torch.autograd.grad(loss[:, [0, 1, 3, 5]].sum(), x)
    spoilt = torch.tensor([[False, False, True, False, True, False]])
    assert torch.equal(~loss.isfinite(), spoilt)
    assert gradient[:, :, [0, 1, 3, 5]].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 8, 3), (2, 8, 0), (2, 0, 3)])
def test_empty(shape):
    x = torch.zeros(shape, requires_grad=True)
    for reduction in REDUCTIONS:
        loss = cosine_loss(x, torch.zeros(shape), reduction=reduction)
        wanted = cosine_loss_plain(x.detach().double(), torch.zeros(shape).double(), reduction=reduction)
        torch.testing.assert_close(loss.double(), wanted, equal_nan=True)
        loss.sum().backward()
        assert x.grad.shape == shape
    # Without positions the mean is NaN. Without channels the cosine is 0.
    expected = math.nan if 0 in (shape[0], shape[2]) else 1.0
    torch.testing.assert_close(cosine_loss(x, x.detach()).item(), expected, equal_nan=True)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(reduction):
    x, y = (random(2, 5, 3, dtype=torch.float64, seed=s).requires_grad_() for s in range(2))
    y_fixed = y.detach()
    assert torch.autograd.gradcheck(lambda p: cosine_loss(p, y_fixed, 1, reduction), x)
    assert torch.autograd.gradgradcheck(lambda p: cosine_loss(p, y_fixed, 1, reduction), x)
    assert torch.autograd.gradcheck(lambda p, t: cosine_loss(p, t, 1, reduction), (x, y))


def test_incoming_gradients_of_every_kind():
    x, y = random(2, 6, 4).requires_grad_(), random(2, 6, 4, seed=1)
    _, slope = reference(x, y, 1, "mean")
    for factor in (1.0, -2.5, 0.0):
        (gradient,) = torch.autograd.grad(cosine_loss(x, y), x, torch.tensor(factor))
        assert (gradient.double() - factor * slope).abs().max() < 1e-6
    weights = random(2, 4, seed=5)
    (gradient,) = torch.autograd.grad(cosine_loss(x, y, reduction="none"), x, weights)
    _, slope = reference(x, y, 1, "none")
    assert (gradient.double() - slope * weights[:, None].double()).abs().max() < 1e-5
    half = x.detach().bfloat16().requires_grad_()
    (gradient,) = torch.autograd.grad(cosine_loss(half, y.bfloat16(), reduction="none"), half, weights)
    _, slope = reference(half, y.bfloat16(), 1, "none")
    wanted = slope * weights[:, None].double()
    # Rounded once when it is written, once more when it is scaled.
    assert (gradient.double() - wanted).abs().max() <= 2**-7 * wanted.abs().max()


def test_backward_twice_through_a_retained_graph():
    x, y = random(2, 6, 4).requires_grad_(), random(2, 6, 4, seed=1)
    loss = cosine_loss(x, y)
    (first,) = torch.autograd.grad(loss, x, torch.tensor(3.0), retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert torch.equal(first, kept)
    torch.testing.assert_close(first, 3 * second)
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(x.grad, 2 * second)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_prediction_changed_in_place_is_noticed():
    x, y = random(2, 6, 4).requires_grad_(), random(2, 6, 4, seed=1)
    z = x * 1
    loss = cosine_loss(z, y)
    z.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Named(torch.Tensor):
    """A subclass, which goes through the dispatcher."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("way", ["subclass", "compiled"])
def test_second_derivatives_wherever_the_loss_is_computed(way, dtype):
    def penalised(loss, x):
        value = loss(x, y, 1, "sum")
        (gradient,) = torch.autograd.grad(value, x, create_graph=True)
        return torch.autograd.grad((value + 0.1 * gradient.square().sum()).sum(), x)[0]

    x, y = random(2, 6, 4, dtype=dtype), random(2, 6, 4, dtype=dtype, seed=1)
    wanted = penalised(cosine_loss_plain, x.clone().requires_grad_())
    if way == "subclass":
        found = penalised(cosine_loss, x.as_subclass(Named).requires_grad_())
    else:
        torch._dynamo.reset()
        found = penalised(torch.compile(cosine_loss, backend="eager"), x.clone().requires_grad_())
    torch.testing.assert_close(found.as_subclass(torch.Tensor), wanted, rtol=2e-3, atol=1e-5)


def test_linearize_follows_it():
    x, y, tangent = (random(3, 6, 4, seed=s) for s in range(3))
    value, push = torch.func.linearize(partial(cosine_loss, target=y), x)
    wanted, slope = torch.func.jvp(partial(cosine_loss_plain, target=y), (x,), (tangent,))
    torch.testing.assert_close((value, push(tangent)), (wanted, slope))


def test_trains_a_module_and_runs_under_autocast():
    torch.manual_seed(0)
    net, criterion = nn.Conv2d(3, 8, 1), CosineLoss()
    imgs, target = random(2, 3, 4, 4), random(2, 8, 4, 4, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = criterion(net(imgs), target.bfloat16())
    loss.backward()
    assert loss.dtype == torch.float32
    assert net.weight.grad.isfinite().all()
    assert repr(criterion) == "CosineLoss(dim=1, reduction='mean')"
    assert criterion(net(imgs), target).item() == cosine_loss(net(imgs), target).item()


def test_opcheck():
    for grad in (False, True):
        for shape, dim, dtype in (
            ((2, 5, 3), 1, torch.float32),
            ((2, 5, 3), 2, torch.float64),
            ((4, 7), 0, torch.bfloat16),
        ):
            x, y = random(*shape, dtype=dtype).requires_grad_(grad), random(*shape, dtype=dtype, seed=1)
            for reduction in REDUCTIONS:
                torch.library.opcheck(torch.ops.lift_fast.cosine_loss.default, (x, y, dim, reduction, True))
    x, y = random(2, 5, 3), random(2, 5, 3, seed=1)
    torch.library.opcheck(torch.ops.lift_fast.cosine_loss.default, (x, y, 1, "mean", False))
    torch.library.opcheck(torch.ops.lift_fast.cosine_loss_backward.default, (x, random(2, 3), 1))
    torch.library.opcheck(torch.ops.lift_fast.cosine_loss_backward.default, (x, torch.tensor(0.5), 1))
    half = random(2, 5, 3, dtype=torch.float16).requires_grad_()
    for above, reduction in ((torch.tensor(0.5), "mean"), (random(2, 3), "none")):
        arguments = (half, half.detach() + 1, above, 1, reduction)
        torch.library.opcheck(torch.ops.lift_fast.cosine_loss_gradient.default, arguments)
        torch.library.opcheck(torch.ops.lift_fast.cosine_loss.default, (half, half.detach() + 1, 1, reduction, True))


def test_operator_without_gradient_says_so():
    x = random(2, 5, 3).requires_grad_()
    loss, _ = torch.ops.lift_fast.cosine_loss(x, random(2, 5, 3, seed=1), 1, "mean", False)
    with pytest.raises(RuntimeError, match="with_gradient=False"):
        loss.backward()


def test_compiles_in_float16():
    torch._dynamo.reset()
    compiled = torch.compile(cosine_loss, fullgraph=True, backend="aot_eager")
    x, y = (random(2, 6, 5, dtype=torch.float16, seed=s) for s in range(2))
    x = (x * 2e-6).requires_grad_()
    _, slope = reference(x, y, 1, "sum")
    (gradient,) = torch.autograd.grad(compiled(x, y, reduction="sum"), x, torch.tensor(0.01))
    assert slope.abs().max() > 65504
    assert (gradient.double() - 0.01 * slope).abs().max() <= 2**-10 * 0.01 * slope.abs().max()


@pytest.mark.parametrize("fmt", [torch.contiguous_format, torch.channels_last], ids=str)
def test_compiles_whole_and_once(fmt):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, y: 2 * cosine_loss(x * 1.5, y), fullgraph=True, backend=counter)
    for seed in range(3):
        x = random(2, 6, 3, 4, seed=seed).to(memory_format=fmt).requires_grad_()
        y = random(2, 6, 3, 4, seed=seed + 9).to(memory_format=fmt)
        loss = compiled(x, y)
        (gradient,) = torch.autograd.grad(loss, x)
        _, slope = reference(x * 1.5, y, 1, "mean")
        assert (gradient.double() - 3 * slope).abs().max() < 1e-6
    assert counter.frame_count == 1


def test_threads_do_not_change_the_result():
    x, y = random(3, 33, 20, 21).requires_grad_(), random(3, 33, 20, 21, seed=1)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        loss = cosine_loss(x, y)
        results.append((loss.item(), torch.autograd.grad(loss, x)[0]))
    torch.set_num_threads(1)
    for loss, gradient in results[1:]:
        assert loss == results[0][0]
        assert torch.equal(gradient, results[0][1])


def test_backward_in_another_thread():
    x, y = random(2, 6, 4).requires_grad_(), random(2, 6, 4, seed=1)
    loss = cosine_loss(x, y)
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert (x.grad.double() - reference(x, y, 1, "mean")[1]).abs().max() < 1e-6


BAD = {
    "type": ((3, torch.ones(2, 2)), {}, TypeError, "prediction must be a torch.Tensor, got int"),
    "integers": ((torch.ones(2, 2).long(),) * 2, {}, TypeError, "got torch.int64"),
    "dtypes": ((torch.ones(2, 2), torch.ones(2, 2).half()), {}, TypeError, r"target\.to\(prediction\.dtype\)"),
    "shapes": ((torch.ones(2, 2), torch.ones(2, 3)), {}, ValueError, r"\[2, 2\] and target \[2, 3\]"),
    "device": ((torch.ones(2, 2), torch.ones(2, 2, device="meta")), {}, ValueError, "target on meta"),
    "dim": ((torch.ones(2, 2),) * 2, {"dim": 2}, ValueError, "dim must be an integer from -2 to 1"),
    "no dim": (
        (torch.tensor(1.0),) * 2,
        {"dim": 0},
        ValueError,
        "are scalars; expected at least the dimension of the descriptors",
    ),
    "nested": ((torch.nested.nested_tensor([torch.ones(2)]),) * 2, {}, TypeError, "must be dense, got a nested tensor"),
    "mkldnn": ((torch.ones(2, 2).to_mkldnn(),) * 2, {}, TypeError, r"must be dense, got torch._mkldnn"),
    "float8": ((torch.ones(2, 2).to(torch.float8_e4m3fn),) * 2, {}, TypeError, "got torch.float8_e4m3fn"),
    "huge dim": ((torch.ones(2, 2),) * 2, {"dim": 2**70}, ValueError, "dim must be an integer"),
    "a list": ((torch.ones(2, 2),) * 2, {"reduction": ["mean"]}, ValueError, r"got \['mean'\]"),
    "sparse": ((torch.ones(2, 2).to_sparse(),) * 2, {}, TypeError, r"must be dense, got torch.sparse_coo"),
    "bool": ((torch.ones(2, 2),) * 2, {"dim": True}, ValueError, "got True"),
    "reduction": ((torch.ones(2, 2),) * 2, {"reduction": "max"}, ValueError, "'mean', 'sum', 'none', got 'max'"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_arguments_are_refused(case):
    arguments, options, error, message = BAD[case]
    with pytest.raises(error, match=message):
        cosine_loss(*arguments, **options)


def test_module_refuses_an_unknown_reduction():
    with pytest.raises(ValueError, match="got 'max'"):
        CosineLoss(reduction="max")


def test_registry():
    assert sorted(LOSSES) == ["cosine", "l1", "l2"]
    x, y = random(2, 5, 3), random(2, 5, 3, seed=1)
    assert feature_loss("cosine")(x, y, 1) == cosine_loss(x, y, 1)
    torch.testing.assert_close(feature_loss("l1")(x, y, 1), (x - y).abs().mean())
    torch.testing.assert_close(feature_loss("l2")(x, y, 1), (x - y).square().mean())
    with pytest.raises(ValueError, match="cosine, l1, l2, got 'huber'"):
        feature_loss("huber")
    assert lift_fast.cosine_loss is cosine_loss


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_function_transforms_and_forward_mode_follow_it(reduction):
    x, y, tangent = random(3, 6, 4), random(3, 6, 4, seed=1), random(3, 6, 4, seed=2)
    loss = partial(cosine_loss, target=y, reduction=reduction)
    plain = partial(cosine_loss_plain, target=y, reduction=reduction)
    wanted, slope = torch.func.jvp(plain, (x,), (tangent,))
    assert slope.abs().max() > 1e-3
    torch.testing.assert_close(torch.func.jvp(loss, (x,), (tangent,)), (wanted, slope))
    with forward_ad.dual_level():
        torch.testing.assert_close(forward_ad.unpack_dual(loss(forward_ad.make_dual(x, tangent))).tangent, slope)
    jacobian = torch.func.jacrev(plain)(x)
    torch.testing.assert_close(torch.func.jacrev(loss)(x), jacobian)
    for create_graph in (False, True):
        torch.testing.assert_close(
            torch.autograd.functional.jacobian(loss, x, vectorize=True, create_graph=create_graph), jacobian
        )
    z = x.clone().requires_grad_()
    value = loss(z)
    rows = torch.eye(max(1, value.numel())).view(-1, *value.shape)
    (found,) = torch.func.vmap(lambda row: torch.autograd.grad(value, z, row))(rows)
    torch.testing.assert_close(found.view(jacobian.shape), jacobian)
    each = torch.func.vmap(partial(cosine_loss, dim=0, reduction=reduction))(x, y)
    torch.testing.assert_close(each, torch.stack([cosine_loss(x[i], y[i], 0, reduction) for i in range(len(x))]))


@pytest.mark.unpoisoned
def test_native_memory_is_the_gradient_and_little_more():
    if not _native.can_run()[0]:
        pytest.skip(_native.can_run()[1])
    x, y = random(4, 64, 32, 32), random(4, 64, 32, 32, seed=1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        op._cosine_loss(x, y, 1, "mean", True)
    taken = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    positions = 4 * 32 * 32
    assert x.numel() * 4 <= taken <= x.numel() * 4 + 16 * positions
