"""Errors of public operators for tensors and options that they do not support, and results on ``meta``."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from lift_fast import LiFT, cosine_loss, dense_match, nearest, propagate_labels

X = torch.randn(6, 4)
MAP = torch.randn(1, 4, 2, 3)
TOKENS, PICTURES = torch.randn(1, 6, 4), torch.randn(1, 3, 16, 24)
CALLS = {
    "nearest": (nearest, {"query": X, "key": X}),
    "nearest in a window": (partial(nearest, window=(1, (2, 3))), {"query": X, "key": X}),
    "dense_match": (
        partial(dense_match, query_size=(5, 7), key_size=(4, 4)),
        {"query_map": MAP, "key_map": MAP, "points": torch.ones(1, 2, 2)},
    ),
    "cosine_loss": (cosine_loss, {"prediction": X, "target": X}),
    "propagate_labels": (partial(propagate_labels, grid=(2, 3)), {"query": X, "key": X, "labels": X}),
    "LiFT": (LiFT(4, 8).eval(), {"imgs": PICTURES, "x": TOKENS}),
    "LiFT in training": (LiFT(4, 8).train(), {"imgs": PICTURES, "x": TOKENS}),
    "matching_map": (LiFT(4, 8).eval().matching_map, {"imgs": PICTURES, "x": TOKENS}),
}
OTHERS = {
    "sparse": (lambda t: t.to_sparse(), "sparse_coo"),
    "nested": (lambda t: torch.nested.as_nested_tensor([t, t]), "nested"),
    "jagged": (lambda t: torch.nested.as_nested_tensor([t, t], layout=torch.jagged), "nested"),
    "mkldnn": (lambda t: t.to_mkldnn(), "_mkldnn"),
    "float8": (lambda t: t.to(torch.float8_e5m2), "float8_e5m2"),
    "complex": (lambda t: t.to(torch.complex64), "complex64"),
    "bool": (lambda t: t > 0, "bool"),
    "list": (lambda t: t.tolist(), "list"),
    "numpy": (lambda t: t.numpy(), "ndarray"),
}
# Matching takes arrays, networks and losses do not.
ARRAYS = ("nearest", "nearest in a window", "dense_match", "propagate_labels")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize(("call", "argument"), [(call, argument) for call in CALLS for argument in CALLS[call][1]])
def test_other_tensors_are_named(call, argument, other):
    function, arguments = CALLS[call]
    change, named = OTHERS[other]
    if other == "numpy" and call in ARRAYS:
        change, named = lambda t: np.ma.masked_invalid(t.numpy()), "masked"
    with pytest.raises((TypeError, ValueError)) as caught:
        function(**{**arguments, argument: change(arguments[argument])})
    assert named in str(caught.value)
    assert argument in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("call", CALLS)
def test_meta_gives_meta(call):
    function, arguments = CALLS[call]
    if isinstance(function, LiFT):
        function = LiFT(4, 8).to("meta").train(function.training)
    elif call == "matching_map":
        function = LiFT(4, 8).to("meta").eval().matching_map
    real = CALLS[call][0](**arguments)
    for track in (False, True):
        given = {name: value.to("meta") for name, value in arguments.items()}
        if track and "prediction" in given:
            given["prediction"].requires_grad_()
        with torch.set_grad_enabled(track):
            made = function(**given)
        for ours, wanted in zip(*(r if isinstance(r, tuple) else (r,) for r in (made, real)), strict=True):
            assert ours.is_meta
            assert (ours.shape, ours.dtype) == (wanted.shape, wanted.dtype)


def test_a_meta_loss_has_a_meta_gradient():
    for dtype in (torch.float32, torch.float16):
        x = torch.empty(2, 5, 3, device="meta", dtype=dtype, requires_grad=True)
        (gradient,) = torch.autograd.grad(cosine_loss(x, x.detach()), x)
        assert gradient.is_meta
        assert (gradient.shape, gradient.dtype) == (x.shape, dtype)


@pytest.mark.parametrize("whole", [np.int64(2), np.uint8(2), np.int32(2)])
def test_whole_numbers_of_numpy_are_whole_numbers(whole):
    assert nearest(X, X, k=whole).index.shape == (6, 2)
    assert torch.equal(nearest(X, X, window=(whole, (whole, 3))).index, nearest(X, X, window=(2, (2, 3))).index)
    assert dense_match(MAP, MAP, (whole, 3), (whole, whole)).xy.shape == (1, 6, 2)
    assert cosine_loss(MAP, MAP, dim=whole, reduction="none").shape == (1, 4, 3)
    assert propagate_labels(X, X, X, grid=(whole, 3), k=whole).shape == (6, 4)
    assert LiFT(whole, 8).in_channels == 2


HUGE = [2**62, 2**63, 2**70, -(2**70)]


@pytest.mark.parametrize("number", HUGE)
def test_numbers_beyond_counting_are_refused(number):
    for call in (
        lambda: nearest(X, X, k=number),
        lambda: nearest(X, X, window=(1, (number, 3))),
        lambda: nearest(X, X[:0], window=(1, (2, 3), (number, number))),
        lambda: dense_match(MAP, MAP, (number, 3), (4, 4)),
        lambda: dense_match(MAP, MAP, (4, 3), (4, number)),
        lambda: cosine_loss(X, X, dim=number),
        lambda: propagate_labels(X, X, X, grid=(2, 3), key_grid=(number, 1)),
        lambda: LiFT(number, 8),
        lambda: LiFT(8, number),
        lambda: LiFT(8, 8, image_channels=number),
        lambda: LiFT(8, 8, extra_image_blocks=number),
    ):
        with pytest.raises(ValueError, match=r"must be (at most|an integer)"):
            call()


def test_a_window_or_a_k_beyond_the_keys_is_all_of_them():
    assert torch.equal(nearest(X, X, window=(2**70, (2, 3))).index, nearest(X, X).index)
    whole = propagate_labels(X, X, X, grid=(2, 3), radius=None, k=6)
    assert torch.equal(propagate_labels(X, X, X, grid=(2, 3), radius=2**70, k=2**70), whole)
    with pytest.raises(ValueError, match="k must be at most 65536"):
        nearest(X, X, k=1 << 17)
    assert nearest(X, X, k=9).index[:, 6:].unique().tolist() == [-1]


def test_results_do_not_depend_on_global_defaults():
    """In addition to the fuzzed calls: functions called once for a network, and LiFT's weights."""
    lift = LiFT(4, 14).eval()
    imgs, x = torch.randn(1, 3, 28, 42), torch.randn(1, 6, 4)
    with torch.no_grad():
        wanted = lift(imgs, x), lift.matching_map(imgs, x, normalize=True)
        for dtype in (torch.float64, torch.bfloat16):
            other = LiFT(4, 14).eval()
            other.load_state_dict(lift.state_dict())
            torch.set_default_dtype(dtype)
            try:
                with torch.device("meta"):
                    found = other(imgs, x), other.matching_map(imgs, x, normalize=True)
            finally:
                torch.set_default_dtype(torch.float32)
            for ours, expected in zip(found, wanted, strict=True):
                assert torch.equal(ours, expected)


def test_numbers_beyond_the_result_s_range_are_refused():
    with pytest.raises(ValueError, match="temperature must be a positive number"):
        propagate_labels(X, X, X, grid=(2, 3), temperature=10**400)
    with pytest.raises(ValueError, match=r"labels of up to 1e\+300 leave the range of the float32 result"):
        propagate_labels(X, X, torch.full((6, 1), 1e300, dtype=torch.float64), grid=(2, 3))
    wide = propagate_labels(X.double(), X.double(), torch.full((6, 1), 1e300, dtype=torch.float64), grid=(2, 3))
    assert wide.isfinite().all()
