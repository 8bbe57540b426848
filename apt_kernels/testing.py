"""How results are judged: against float64, relative to what PyTorch itself reaches."""

from __future__ import annotations

import torch
from torch import Tensor

ULPS = 4


def assert_as_accurate(
    actual: Tensor, reference: Tensor, exact: Tensor, name: str = "result", ulps: float = ULPS
) -> None:
    """Asserts |actual - exact| <= 2 max |reference - exact| + `ulps` units in the last place.

    A float64 result is compared with the oracle of the same precision, to 1000 eps of its largest
    element.

    Args:
        actual: what the kernel gave.
        reference: what plain PyTorch gives for the same inputs in the same dtype.
        exact: the same in float64.
        name: what the message calls it.
        ulps: units in the last place of `actual.dtype`, at the magnitude of each element.

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
    bound = 2 * reference_error + ulps * ulp
    if actual.dtype == torch.float64:  # the oracle is no more exact than the result
        bound = bound + 1000 * info.eps * wanted.abs().masked_fill(odd, 0).max()
    excess = torch.where(error.isnan(), torch.inf, error - bound)
    worst = int(excess.argmax())
    assert excess.flatten()[worst] <= 0, (
        f"{name}: element {worst} is {got.flatten()[worst]:.9g}, float64 gives "
        f"{wanted.flatten()[worst]:.9g}: error {error.flatten()[worst]:.3g}, allowed "
        f"{bound.flatten()[worst]:.3g} (the reference's largest error is {reference_error:.3g}; "
        f"{int((excess > 0).sum())} of {got.numel()} elements are beyond)"
    )
