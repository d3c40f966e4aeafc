"""Comparisons whose tolerance comes from rounding, not from taste."""

import torch


def assert_no_worse(got, ref, exact, name, factor=3.0):
    """Fail if `got` is over `factor` times as far from the float64 answer as same-dtype `ref` is.

    Args:
        got: The result under test.
        ref: The reference's result, same shape and dtype.
        exact: The same in float64, on whatever device.
        name: What is compared, for the message.
        factor: How much larger than the reference's own error the error may be, 32 eps aside.
    """
    assert (got.shape, got.dtype) == (ref.shape, ref.dtype), f"{name}: {got.shape} {got.dtype}"
    scale = exact.abs().max().clamp_min(1e-30)
    err, ref_err = ((x.to(exact) - exact).abs().max() / scale for x in (got, ref))
    bound = factor * ref_err + 32 * torch.finfo(ref.dtype).eps
    # "not >" would let NaN pass.
    assert err <= bound, f"{name}: error {err:.1e} exceeds {bound:.1e} (reference {ref_err:.1e})"
