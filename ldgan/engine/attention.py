"""Attention kernels: PyTorch's scaled dot-product attention, or that of xformers where it really runs."""

from __future__ import annotations

import functools
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ldgan.engine.cli import UserError

Kernel = Literal["sdpa", "xformers"]


def attend(q: Tensor, k: Tensor, v: Tensor, kernel: Kernel) -> Tensor:
    """softmax(q k^T / sqrt(C)) v; all (B, heads, positions, C), and so is the result.

    Raises:
        UserError: ``kernel`` does not run on this device with this dtype, see `check_kernel`.
        ValueError: there is no such kernel.
    """
    check_kernel(kernel, q.device, q.dtype)
    if kernel == "sdpa":
        return F.scaled_dot_product_attention(q, k, v)
    return _xformers_attention(q, k, v)


def check_kernel(kernel: Kernel, device: torch.device, dtype: torch.dtype) -> None:
    """Return if ``kernel`` runs on ``device`` with ``dtype``; the first call for each of them tries it.

    Raises:
        UserError: it does not run.
        ValueError: there is no such kernel.
    """
    if kernel == "sdpa":
        return
    if kernel != "xformers":
        raise ValueError(f"no attention kernel {kernel!r}; there are 'sdpa' and 'xformers'")
    if reason := _failure_of_xformers(device, dtype):
        raise UserError(f"attention_kernel=xformers does not run on {device} in {dtype} ({reason}); use sdpa")


@functools.cache
def _failure_of_xformers(device: torch.device, dtype: torch.dtype) -> str:
    """Why attention and its gradient do not run, in one line; empty if they do.

    An xformers without kernels for this machine still imports, with a warning: only trying an operator tells.
    """
    q = torch.ones(1, 1, 16, 64, device=device, dtype=dtype, requires_grad=True)
    try:
        with torch.enable_grad():
            _xformers_attention(q, q, q).sum().backward()
    except (ImportError, NotImplementedError, RuntimeError, ValueError) as error:
        return next(iter(str(error).splitlines()), type(error).__name__).strip()
    return ""


def _xformers_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention  # takes seconds: imported only where asked for

    return memory_efficient_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
