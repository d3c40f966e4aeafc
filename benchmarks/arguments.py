"""Kinds of arguments that the command lines share."""

from __future__ import annotations

import argparse

import torch


def positive(text: str) -> int:
    """An argument that counts something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"want at least 1, got {value}")
    return value


def usable_device(text: str) -> str:
    """An argument that names a device which is there."""
    try:
        torch.empty(0, device=text)
        if torch.device(text).type not in ("cpu", "cuda"):
            raise RuntimeError("want cpu or cuda")
    except (AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"cannot use {text!r}: {reason}") from None
    return text
