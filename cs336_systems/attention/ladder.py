"""A ladder from one tile to training in 16 bits: each rung asks one more thing of an implementation of attention.

Whoever stands below a rung knows what to look at: a rung says what it tests and what usually makes it fail, and a
failure says which rows are wrong and, where the result is that of a classical mistake, which mistake it is. What is
compared with is float64 with every intermediate stored; what is allowed is a small multiple of what the materialised
reference errs in the same precision.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Literal

import torch

from cs336_systems.attention.backends import AttentionFunction
from cs336_systems.attention.trial import (
    Case,
    Failed,
    Raised,
    Skipped,
    Subject,
    batch_items,
    forward,
    gradient,
    in_precision,
    other_upstream,
    saved_logsumexp,
    strided,
    unchanged_inputs,
)
from cs336_systems.errors import UserError, first_line

Status = Literal["passed", "failed", "not supported", "skipped"]


@dataclasses.dataclass(frozen=True)
class Rung:
    """One thing that is asked of an implementation."""

    name: str
    tests: str
    cause: str
    check: Callable[[Subject], None]
    may_refuse: bool = False
    """Whether an exception is an answer, too: "not supported"; the course asks for less."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How an implementation did at a rung."""

    rung: Rung
    status: Status
    text: str = ""
    """Why it did not pass."""
    cause: str = ""
    """What usually makes a result wrong as it was; an exception tells its own."""


_LENGTHS = ((64, 256), (256, 64))
_RAGGED = ((17, 17), (100, 100), (129, 70))
_SQUARE = Case(128, 128, 32)
_ROUNDED = (
    "Keep scores, m, l and the accumulator in float32, cast P to the precision of V just before their product, and "
    "cast the results as they are stored."
)

RUNGS = (
    Rung(
        "one tile",
        "16 queries and 16 keys give softmax(Q K^T / sqrt d) V",
        "No scale 1/√d, a softmax that does not run along the keys, or no division of the accumulator by l at the end.",
        lambda subject: forward(subject, Case()),
    ),
    Rung(
        "large scores",
        "scores that exp would overflow on give no NaN",
        "The maximum of a row is not subtracted before exp.",
        lambda subject: forward(subject, Case(scores="large")),
    ),
    Rung(
        "several tiles",
        "256 queries and 256 keys are put together from tiles",
        "A new maximum m_new rescales both l and the accumulator by exp(m_old − m_new), never by its inverse; and the "
        "division by l comes once, after the last tile of keys.",
        lambda subject: forward(subject, Case(256, 256, 32)),
    ),
    Rung(
        "rising maximum",
        "a maximum that is far below 0 and grows from tile to tile is followed",
        "m starts at 0 instead of −∞, or the new maximum is that of the tile alone instead of max(m_old, rowmax).",
        lambda subject: forward(subject, Case(256, 256, 32, scores="rising")),
    ),
    Rung(
        "ragged tiles",
        "lengths that are no multiple of a tile leave nothing out and count nothing twice",
        "Keys beyond the end are loaded as 0, score 0, and count in l: set their scores to −∞. The course lets you "
        "assume powers of two: raise an exception for other lengths, and this rung is passed over.",
        lambda subject: forward(subject, *(Case(*lengths, 32) for lengths in _RAGGED)),
        may_refuse=True,
    ),
    Rung(
        "different lengths",
        "there may be fewer or more queries than keys",
        "One length is used for both: in the number of tiles, in a stride, or in the shape of l, m or L.",
        lambda subject: forward(subject, *(Case(*lengths, 32) for lengths in _LENGTHS)),
    ),
    Rung(
        "head dimension 80",
        "a head dimension that is no power of two is right, or refused",
        "A tile is padded to a power of two with what is not 0, or the scale is that of the padded dimension. The "
        "course lets you assume powers of two: raise an exception for others, and this rung is passed over.",
        lambda subject: forward(subject, Case(64, 64, 80)),
        may_refuse=True,
    ),
    Rung(
        "batch items",
        "every item of the batch is computed from itself alone",
        "The batch is folded into the length, or its index or stride is missing for one of the tensors.",
        batch_items,
    ),
    Rung(
        "heads",
        "every head of every item is computed from itself alone",
        "A reshape where a transpose is meant, or heads and batch in another order on the way back than on the way in.",
        lambda subject: forward(subject, Case(64, 64, 32, batch=2, heads=3)),
    ),
    Rung(
        "strided inputs",
        "tensors may lie in memory as they like, or are refused",
        "Strides are assumed, not asked of the tensor: pass x.stride(…) of every dimension, or call .contiguous().",
        strided,
        may_refuse=True,
    ),
    Rung(
        "causal, one tile",
        "query i sees the keys 0 to i",
        "is_causal is ignored, or the comparison is < where ≤ is meant: a query sees its own key.",
        lambda subject: forward(subject, Case(is_causal=True)),
    ),
    Rung(
        "causal, several tiles",
        "the mask goes by positions in the whole sequence",
        "Positions inside the tile are compared: add those of its first query and first key. Or a tile on the diagonal "
        "is left out, as if it lay above.",
        lambda subject: forward(subject, Case(256, 256, 32, is_causal=True)),
    ),
    Rung(
        "causal, different lengths",
        "the mask is aligned at the top left: query 0 sees key 0 alone",
        "The mask is aligned at the lower right, or keys are left out beyond the number of queries.",
        lambda subject: forward(subject, *(Case(*lengths, 32, is_causal=True) for lengths in _LENGTHS)),
    ),
    Rung(
        "logsumexp",
        "exactly one saved tensor has a number per query, and it is m + log l",
        "Save L = m + log l, of shape (batch, queries), by ctx.save_for_backward, and no other tensor of that shape. A "
        "kernel that computes with exp2 has it in base 2.",
        saved_logsumexp,
    ),
    Rung(
        "gradient of V",
        "dV = P^T dO",
        "P is not transposed, or recomputed from a wrong logsumexp, P = exp(S − L); or dV is accumulated into memory "
        "that was not set to 0.",
        lambda subject: gradient(subject, _SQUARE, names=("grad_value",)),
    ),
    Rung(
        "gradient of Q",
        "dQ = dS K / sqrt d with dS = P * (dP - D)",
        "D = rowsum(dO ∘ O) or the scale 1/√d is missing; or dQ is accumulated into memory that was not set to 0.",
        lambda subject: gradient(subject, _SQUARE, names=("grad_query",)),
    ),
    Rung(
        "gradient of K",
        "dK = dS^T Q / sqrt d",
        "dS is not transposed, or the scale 1/√d is missing; or dK is accumulated into memory that was not set to 0.",
        lambda subject: gradient(subject, _SQUARE, names=("grad_key",)),
    ),
    Rung(
        "causal gradients",
        "the recomputed weights are masked as in forward",
        "is_causal is not kept for backward (ctx.is_causal = is_causal), or the mask there is another than in forward.",
        lambda subject: gradient(
            subject, *(Case(*lengths, 32, is_causal=True) for lengths in ((16, 16), (256, 256), *_LENGTHS))
        ),
    ),
    Rung(
        "gradients of batch items and heads",
        "gradients stay with their item and head, also where lengths differ",
        "The index or the stride of the batch is missing for dO, O, L or D, or for a gradient.",
        lambda subject: gradient(subject, *(Case(*lengths, 32, batch=2, heads=2) for lengths in _LENGTHS)),
    ),
    Rung(
        "gradients of ragged tiles",
        "what lies beyond the end takes no part in any gradient",
        "Queries beyond the end have L = 0, so that their P is not 0: mask rows as well as columns.",
        lambda subject: gradient(
            subject, *(Case(*lengths, 32, is_causal=causal) for lengths in _RAGGED for causal in (False, True))
        ),
        may_refuse=True,
    ),
    Rung(
        "another upstream gradient",
        "backward goes by the dO that it is given, of any strides",
        "dO is taken to be contiguous (that of .sum() has stride 0: call .contiguous() or pass its strides), or "
        "something is left over from the backward before.",
        other_upstream,
    ),
    Rung(
        "unchanged inputs",
        "neither forward nor backward writes into its inputs",
        "An operator in place, such as q *= scale or q.mul_(scale): write q = q * scale.",
        unchanged_inputs,
    ),
    Rung(
        "bfloat16",
        "output and gradients err no more than a small multiple of what the reference errs",
        _ROUNDED,
        lambda subject: in_precision(subject, torch.bfloat16),
    ),
    Rung(
        "float16",
        "output and gradients err no more than a small multiple of what the reference errs in float16",
        _ROUNDED,
        lambda subject: in_precision(subject, torch.float16),
    ),
)


def attempt(
    rung: Rung, function: AttentionFunction, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Outcome:
    """How `function` does at one rung.

    Raises:
        UserError: it cannot run there at all, and says so itself.
    """
    if "torch._dynamo" in sys.modules:
        # It compiles anew for every shape, and gives up after a few: not what is asked here.
        torch.compiler.reset()
    try:
        rung.check(Subject(function, torch.device(device), dtype))
    except Skipped as reason:
        return Outcome(rung, "skipped", str(reason))
    except Failed as failure:
        if isinstance(failure, Raised):
            return Outcome(rung, "not supported" if rung.may_refuse else "failed", str(failure))
        return Outcome(rung, "failed", str(failure), rung.cause)
    except torch.AcceleratorError as error:
        # A kernel that wrote where it must not leaves a device that nothing runs on until the process ends.
        return Outcome(rung, "failed", f"the device takes nothing more after what was run before: {first_line(error)}")
    except UserError as error:
        if not rung.may_refuse:
            raise
        return Outcome(rung, "not supported", str(error))
    return Outcome(rung, "passed")


def climb(
    function: AttentionFunction, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Iterator[Outcome]:
    """One rung after the other; whoever wants to stop at a failure stops asking.

    Raises:
        UserError: `function` cannot run there at all, and says so itself.
    """
    for rung in RUNGS:
        yield attempt(rung, function, device, dtype)
