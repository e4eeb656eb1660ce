"""The compiled backward is compiled for calls of many kinds, and never gives up compiling."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from cs336_systems.attention import recompute
from cs336_systems.attention.recompute import compiled_backward, recomputed_backward

pytestmark = pytest.mark.problem("flash_backward")


def test_more_kinds_of_calls_than_the_compiler_usually_bears_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = torch.compile(recomputed_backward, dynamic=True, fullgraph=True, backend="eager")
    monkeypatch.setattr(recompute, "_compiled", lambda: compiled)
    kinds = list(
        itertools.product((torch.float32, torch.float64, torch.float16), (None, 0, 3), ((4, 4), (4, 2), (1, 1)))
    )
    assert len(kinds) > torch._dynamo.config.recompile_limit
    generator = torch.Generator().manual_seed(0)
    for dtype, offset, (heads, key_heads) in kinds:
        queries = [torch.randn(2, heads, 5, 8, generator=generator).to(dtype) for _ in range(3)]
        keys = [torch.randn(2, key_heads, 7, 8, generator=generator).to(dtype) for _ in range(2)]
        logsumexp = torch.randn(2, heads, 5, generator=generator)
        arguments: Any = (queries[0], *keys, queries[1], logsumexp, queries[2], offset)
        for one, other in zip(compiled_backward(*arguments), recomputed_backward(*arguments), strict=True):
            torch.testing.assert_close(one, other)
