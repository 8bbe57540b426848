"""How results are judged: against float64, relative to what PyTorch itself reaches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

ULPS = 4
RUNS = 16
MOST_LOST = 1000
UNIT = 2.0**-34  # large beside float64's eps, small enough that changes are proportional to it

aten = torch.ops.aten
# An operator that is in none of these sets adds nothing to the estimate: it can only be too strict.
PRODUCTS = {aten.mm, aten.bmm, aten.mv, aten.dot}
SUMS = PRODUCTS | {aten.sum, aten.mean, aten.cumsum}
ROUNDED = SUMS | {
    *(aten.add, aten.sub, aten.rsub, aten.mul, aten.div, aten.reciprocal, aten.addcmul, aten.lerp),
    *(aten.pow, aten.square, aten.sqrt, aten.rsqrt, aten.tanh, aten.sigmoid, aten.softplus),
    *(aten.exp, aten.exp2, aten.expm1, aten.log, aten.log1p, aten.log2),
}
DECISIONS = {
    *(aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge),
    *(aten.argmax, aten.argmin, aten.sort, aten.max),
}
# In one operator of PyTorch: split, so that the terms that cancel inside of it are rounded too.
SPLIT = get_decompositions(
    [
        *(aten._log_softmax, aten._log_softmax_backward_data, aten.logsumexp),
        *(aten._softmax, aten._softmax_backward_data, aten.threshold_backward),
        *(aten.log_sigmoid_forward, aten.log_sigmoid_backward, aten.tanh_backward),
        *(aten.sigmoid_backward, aten.softplus_backward, aten.var, aten.addmm),
    ]
)


class _RandomRounding(TorchDispatchMode):
    """Changes each result, and each term of a sum, by a random part of `unit`; takes the decisions
    (comparisons, orders) of the first run, in which `unit` is 0."""

    def __init__(
        self,
        unit: float,
        decisions: list[Tensor],
        generator: torch.Generator,
        rows_alike: bool = False,
    ):
        super().__init__()
        self.unit, self.generator, self.rows_alike = unit, generator, rows_alike
        self.decisions = decisions
        self.replayed = iter(decisions) if unit else None

    def _round(self, x: Tensor, size: float = 1.0) -> Tensor:
        if not x.is_floating_point():
            return x
        shape = x.shape[-1:] if self.rows_alike else x.shape
        noise = torch.rand(shape, generator=self.generator, dtype=x.dtype).to(x.device) - 0.5
        return x * (1 + size * self.unit * noise)

    def _decide(self, x: Tensor) -> Tensor:
        if x.is_floating_point():  # what `sort` or `max` found there
            return x
        if self.replayed is None:
            self.decisions.append(x.clone())
            return x
        return next(self.replayed).clone()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in SPLIT:
            with self:
                return SPLIT[function](*args, **kwargs)
        packet = function.overloadpacket
        result = function(*args, **kwargs)
        if self.unit and packet in SUMS and result.numel():
            products = packet in PRODUCTS
            count = args[0].shape[-1] if products else args[0].numel() // result.numel()
            size = math.log2(max(count, 2)) ** 0.5  # each term is in at least so many additions
            args = tree_map_only(Tensor, lambda x: self._round(x, size), args)
            result = function(*args, **kwargs)
        if packet in DECISIONS:
            return tree_map_only(Tensor, self._decide, result)
        if self.unit and packet in ROUNDED and not _unchanged(result, args):
            return self._round(result)
        return result


def _unchanged(result: Tensor, args: Sequence) -> bool:
    return isinstance(args[0], Tensor) and torch.equal(result, args[0])  # times 1, plus 0


def rounding_errors(run: Callable[[], Sequence[Tensor]]) -> list[float]:
    """Returns how far each tensor that `run` gives moves where its steps are rounded at random.

    Monte Carlo arithmetic (Parker 1997): `run` computes in float64; in each of `RUNS` repetitions
    the result of every operator, and every term of a sum, is changed by a random part of up to half
    a unit, as rounding to nearest does: of each element by its own, or alike in all rows, whose
    errors then add up. So the terms that cancel on the way to a result show, however small it is.
    A sum of n terms is rounded as pairwise summation does, the best order: log2(n) times a term.
    Comparisons and orders are those of the undisturbed run.

    Args:
        run: a float64 computation, the same at each call; gives tensors.

    Returns:
        For each tensor the largest change of an element, in units of 1: times eps it is the error
        to be expected of a computation in that precision.
    """
    decisions: list[Tensor] = []
    generator = torch.Generator().manual_seed(0)
    with _RandomRounding(0.0, decisions, generator):
        exact = run()
    largest = [0.0] * len(exact)
    for number in range(RUNS):
        with _RandomRounding(UNIT, decisions, generator, rows_alike=number % 2 == 1):
            rounded = run()
        for i, (one, other) in enumerate(zip(rounded, exact, strict=True)):
            if one.numel() and one.is_floating_point():
                change = (one - other).detach().abs().nan_to_num(0, 0, 0).max()
                largest[i] = max(largest[i], float(change) / UNIT)
    return largest


def assert_as_accurate(
    actual: Tensor,
    reference: Tensor,
    exact: Tensor,
    name: str = "result",
    ulps: float = ULPS,
    rounding: Callable[[], float] | None = None,
) -> None:
    """Asserts |actual - exact| <= 2 E + `ulps` units in the last place.

    E is the largest error of the reference in the same dtype, and not below what rounding its steps
    at random causes (`rounding`): one run of the reference may be right by luck, most of all where
    the result is a single element, and whoever adds in another order is not. That estimate is asked
    for only where the reference's own error does not suffice, and believed up to `MOST_LOST` eps of
    the largest element: so a result of exactly 0 stays 0, and where a saturated function hides a
    huge factor the reference decides.

    A float64 result is compared with an oracle of the same precision, whose errors are as large:
    it may be `MOST_LOST` eps of the largest element away, besides.

    Args:
        actual: what the kernel gave.
        reference: what plain PyTorch gives for the same inputs in the same dtype.
        exact: the same in float64.
        name: what the message calls it.
        ulps: units in the last place of `actual.dtype`, at the magnitude of each element.
        rounding: gives the entry of `rounding_errors` for this result, or None. 16-bit results are
            computed in float32.

    Raises:
        AssertionError: a wrong shape, a non-finite element where float64 has another, or an error
            beyond the bound; the message names the worst element.
    """
    assert actual.shape == exact.shape, f"{name}: shape {actual.shape}, expected {exact.shape}"
    assert actual.dtype == reference.dtype, f"{name}: {actual.dtype}, expected {reference.dtype}"
    if actual.numel() == 0:
        return
    if not actual.dtype.is_floating_point:
        assert torch.equal(actual, reference), f"{name}: differs from the reference"
        return
    got, wanted = actual.detach().double().cpu(), exact.detach().double().cpu()
    plain = reference.detach().double().cpu()
    odd = ~torch.isfinite(wanted)
    same = torch.where(wanted.isnan(), got.isnan(), got == wanted) | ~odd
    assert same.all(), (
        f"{name}: {int((~same).sum())} elements should be {wanted[~same][0]}, got {got[~same][0]}"
    )
    error = (got - wanted).abs().masked_fill(odd, 0)
    reference_error = (plain - wanted).abs().masked_fill(odd, 0).nan_to_num(0, 0, 0).max()
    info = torch.finfo(actual.dtype)
    ulp = (wanted.abs().masked_fill(odd, 0) * info.eps).clamp_min(info.tiny * info.eps)
    largest = wanted.abs().masked_fill(odd, 0).max()
    least = ulps * ulp
    if actual.dtype == torch.float64:
        least = least + MOST_LOST * info.eps * largest
    bound = 2 * reference_error + least
    if rounding is not None and not (error <= bound).all():
        unit = min(info.eps, torch.finfo(torch.float32).eps)
        expected = unit * min(rounding(), MOST_LOST * float(largest))
        bound = 2 * reference_error.clamp_min(expected) + least
    excess = torch.where(error.isnan(), torch.inf, error - bound)
    worst = int(excess.argmax())
    assert excess.flatten()[worst] <= 0, (
        f"{name}: element {worst} is {got.flatten()[worst]:.9g}, float64 gives "
        f"{wanted.flatten()[worst]:.9g}: error {error.flatten()[worst]:.3g}, allowed "
        f"{bound.flatten()[worst]:.3g} (the reference's largest error is {reference_error:.3g}; "
        f"{int((excess > 0).sum())} of {got.numel()} elements are beyond)"
    )
