"""gae: what the registry's table cannot say: NumPy, offsets of packed sequences, long rows."""

import warnings

import numpy as np
import pytest
import torch

import apt_kernels
from apt_kernels import dispatch, gae
from apt_kernels.testing import assert_as_accurate

native = pytest.mark.skipif(dispatch._extension is None, reason="the C++ extension is not built")


def _arrays(*shape):
    generator = np.random.default_rng(0)
    rewards, values = generator.standard_normal((2, *shape)).astype(np.float32)
    return rewards, values, generator.random(shape) < 0.7


def test_numpy_arrays_give_numpy_arrays():
    rewards, values, mask = _arrays(5, 40)
    for whiten in (False, True):
        got = gae(rewards, values, mask=mask, bootstrap=values[:, 0], whiten=whiten)
        tensors = map(torch.from_numpy, (rewards, values, mask))
        r, v, m = tensors
        expected = gae(r, v, mask=m, bootstrap=v[:, 0], whiten=whiten)
        for array, tensor in zip(got, expected, strict=True):
            assert isinstance(array, np.ndarray) and array.dtype == np.float32
            np.testing.assert_array_equal(array, tensor.numpy())
    packed = gae(rewards.ravel(), values.ravel(), cu_seqlens=np.array([0, 40, 200]))
    expected = gae(r.ravel(), v.ravel(), cu_seqlens=torch.tensor([0, 40, 200]))
    np.testing.assert_array_equal(packed[0], expected[0].numpy())


def test_numpy_arrays_that_tensors_cannot_be():
    rewards, values, _ = _arrays(4, 20)
    expected = gae(rewards, values)
    flipped = rewards[::-1].copy()[::-1]
    assert flipped.strides[0] < 0
    values.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = gae(flipped, values)
    np.testing.assert_array_equal(got[0], expected[0])
    doubles = gae(rewards.astype(np.float64), values.astype(np.float64))
    assert doubles[0].dtype == np.float64
    with pytest.raises(TypeError, match="values: expected a NumPy array"):
        gae(rewards, list(values))
    with pytest.raises(TypeError, match="rewards: expected dtype"):
        gae(rewards.astype(np.int64), values)
    for wrong in (values.astype(object), values.astype(">f4"), torch.from_numpy(values), [1.0]):
        with pytest.raises(TypeError, match=r"values: expected an? .*array.*, got "):
            gae(rewards, wrong)


@pytest.mark.parametrize("backend", apt_kernels.backends()["operations"]["gae"]["cpu"])
@pytest.mark.parametrize("kind", ["terminated", "truncated", "masked", "packed", "time_major"])
@pytest.mark.parametrize("steps, end", [(4, 1), (40, 11), (40, 32), (1100, 1030)])
def test_what_lies_behind_the_end_of_an_episode_may_be_anything(steps, end, kind, backend):
    rewards, values, _ = map(torch.from_numpy, _arrays(3, steps))
    rewards[:, end + 1], values[:, -1] = torch.nan, torch.inf
    flags = torch.zeros(3, steps, dtype=torch.bool)
    flags[:, end] = True
    options = {"truncated" if kind == "truncated" else "terminated": flags}
    if kind == "masked":
        options["mask"] = torch.ones(3, steps, dtype=torch.bool)
        options["mask"][:, [0, end - 1]] = False
    before = {name: flag[:, : end + 1] for name, flag in options.items()}
    expected = gae(rewards[:, : end + 1], values[:, : end + 1], **before, backend="reference")
    if kind == "packed":
        rewards, values, options = rewards[0], values[0], {}
        options["cu_seqlens"] = torch.tensor([0, end + 1, steps])
        expected = [t[0] for t in expected]
    if kind == "time_major":
        rewards, values, flags = (t.T.contiguous() for t in (rewards, values, flags))
        options = {"terminated": flags, "time_major": True}
    for got, wanted in zip(gae(rewards, values, **options, backend=backend), expected, strict=True):
        got = got.T if kind == "time_major" else got
        torch.testing.assert_close(got[..., : end + 1], wanted)
        assert not got[..., end + 1].isfinite().any()


@native
@pytest.mark.parametrize(
    "offsets, message",
    [([1, 6], "begin with 0"), ([0, 5], "end with 6"), ([0, 7], "end with 6"),
     ([0, 4, 2, 6], "never fall"), ([0, -1, 6], "never fall"), ([0], "end with 6")],
)  # fmt: skip
def test_offsets_outside_the_rows_are_rejected(offsets, message):
    x = torch.randn(6)
    with pytest.raises(ValueError, match=f"cu_seqlens: .*{message}"):
        gae(x, x, cu_seqlens=torch.tensor(offsets))


@pytest.mark.parametrize("time_major", [False, True])
def test_a_hundred_thousand_steps(time_major):
    shape = (100_000, 2) if time_major else (2, 100_000)
    rewards, values = torch.randn(2, *shape)
    mask = torch.rand(shape) < 0.9
    mask[mask.shape[0] // 4 : mask.shape[0] // 2] = True
    options = {"mask": mask, "whiten": True, "time_major": time_major, "gae_lambda": 1.0}
    got = gae(rewards, values, gamma=1.0, **options)
    plain = apt_kernels.reference.gae(rewards, values, gamma=1.0, **options)
    exact = apt_kernels.reference.gae(rewards.double(), values.double(), gamma=1.0, **options)
    for triple in zip(got, plain, exact, strict=True):
        assert_as_accurate(*triple)


def test_results_do_not_depend_on_the_number_of_threads():
    rewards, values = torch.randn(2, 300, 700)
    mask = torch.rand(300, 700) < 0.8
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for time_major in (False, True):
            results.append(gae(rewards, values, mask=mask, whiten=True, time_major=time_major))
    torch.set_num_threads(1)
    for one, two in zip(results[:2], results[2:], strict=True):
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
