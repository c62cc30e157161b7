"""Attention kernels: the same numbers, and a kernel that does not run says so before it is needed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from ldgan.engine import attention
from ldgan.engine.attention import attend, check_kernel
from ldgan.engine.cli import UserError

CPU = torch.device("cpu")


def queries_keys_values() -> Tensor:
    return torch.randn(3, 2, 3, 5, 4, generator=torch.Generator().manual_seed(0))


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """In float64, head by head and position by position."""
    result = torch.zeros_like(q, dtype=torch.float64)
    for sample, head, position in torch.cartesian_prod(*map(torch.arange, q.shape[:3])):
        scores = k[sample, head].double() @ q[sample, head, position].double() / q.shape[-1] ** 0.5
        result[sample, head, position] = (scores.exp() / scores.exp().sum()) @ v[sample, head].double()
    return result.float()


class FakeXformers(ModuleType):
    """xformers.ops with kernels that run everywhere; its layout is (B, positions, heads, C)."""

    def __init__(self) -> None:
        super().__init__("xformers.ops")
        self.num_calls = 0

    def memory_efficient_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.num_calls += 1
        weights = (torch.einsum("bqhc,bkhc->bhqk", q, k) / q.shape[-1] ** 0.5).softmax(dim=-1)
        return torch.einsum("bhqk,bkhc->bqhc", weights, v)


@pytest.fixture(autouse=True)
def untried() -> Iterator[None]:
    """Nothing tried in a test is known in another."""
    attention._failure_of_xformers.cache_clear()
    yield
    attention._failure_of_xformers.cache_clear()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeXformers:
    fake = FakeXformers()
    monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", fake)
    return fake


def test_sdpa_is_softmax_attention(fake: FakeXformers) -> None:
    q, k, v = queries_keys_values()
    torch.testing.assert_close(attend(q, k, v, "sdpa"), by_hand(q, k, v))
    assert fake.num_calls == 0


def test_xformers_gives_the_same_and_is_tried_once(fake: FakeXformers) -> None:
    q, k, v = queries_keys_values()
    for _ in range(3):
        torch.testing.assert_close(attend(q, k, v, "xformers"), by_hand(q, k, v))
    assert fake.num_calls == 1 + 3


def test_every_dtype_is_tried_for_itself(fake: FakeXformers) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        check_kernel("xformers", CPU, dtype)
    assert fake.num_calls == 2


def test_a_kernel_without_gradient_does_not_run(fake: FakeXformers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake, "memory_efficient_attention", lambda q, k, v: q.detach())
    with pytest.raises(UserError, match="does not require grad"):
        check_kernel("xformers", CPU, torch.float32)


def test_xformers_on_a_cpu_is_refused_in_one_line() -> None:
    # It has no kernels for CPUs, and none for platforms where it cannot be installed.
    with pytest.raises(
        UserError, match=r"attention_kernel=xformers does not run on cpu in torch.float32 \(.+\); use s"
    ):
        check_kernel("xformers", CPU, torch.float32)
    q, k, v = queries_keys_values()
    with pytest.raises(UserError) as caught:
        attend(q, k, v, "xformers")
    assert "\n" not in str(caught.value)


def test_an_unknown_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="no attention kernel 'flash'; there are 'sdpa' and 'xformers'"):
        attend(*queries_keys_values(), "flash")
