"""The Triton kernels of FlashAttention-2: forward, and backward in three that write each result once.

Symbols: Q, K, V, O and their gradients dQ, dK, dV, dO; L = logsumexp of a query's scores (natural logarithm);
D = rowsum(dO · O); S = Q Kᵀ/√d; P = exp(S − L). Tiles are BLOCK_Q queries × BLOCK_K keys; BLOCK_D ≥ head_dim is the
power of two that Triton wants, what lies beyond head_dim being masked to zero.

A causal query i sees keys up to i + offset. Key tiles that no query of the tile sees are never visited; a mask is
applied only in the last part of the loop: to the tiles on the diagonal, and to the ragged last one.

Everything is computed in float32 with base-2 exponentials, exp(x) = exp2(x · log₂ e), which is what the hardware has.
Products of float32 inputs run in the precision that the caller names ("ieee" or "tf32"); `tl.dot` on its own takes
TF32. Each result is accumulated by one program in one order, so that a second run gives the same bits.

Source: Dao 2023, "FlashAttention-2", algorithms 1 and 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
# Compiled once for sizes of any kind: Triton would compile anew for 1, and for multiples of 16.
_SIZES = ["num_heads", "group", "num_queries", "num_keys", "offset"]
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def _rows_of(base, stride, rows, num_rows, columns, num_columns, EVEN: tl.constexpr):
    """A tile of a matrix of less than 2³¹ elements, rows `stride` apart; zero beyond its rows and columns."""
    pointers = base + rows[:, None] * stride + columns[None, :]
    if EVEN:
        return tl.load(pointers)
    return tl.load(pointers, mask=(rows[:, None] < num_rows) & (columns[None, :] < num_columns), other=0.0)


@triton.jit
def _query_tile(IS_CAUSAL: tl.constexpr):
    """Which tile of queries this program has; causal, those with the most keys first, so that short ones fill gaps."""
    tile = tl.program_id(0)
    if IS_CAUSAL:
        tile = tl.num_programs(0) - 1 - tile
    return tile


@triton.jit
def _keys_to_visit(tile, num_keys, offset, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, IS_CAUSAL: tl.constexpr):
    """Where the whole tiles of keys end that every query of a tile sees, and where the keys of its last query do."""
    seen = num_keys
    whole = num_keys
    if IS_CAUSAL:
        seen = tl.maximum(tl.minimum(num_keys, (tile + 1) * BLOCK_Q + offset), 0)
        whole = tl.maximum(tl.minimum(num_keys, tile * BLOCK_Q + 1 + offset), 0)
    return whole // BLOCK_K * BLOCK_K, seen


@triton.jit
def _scores(
    q, k, rows, keys, num_keys, offset,
    MASKED: tl.constexpr, IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):
    """S of a tile before it is scaled; −∞ beyond the last key and, if causal, above the diagonal."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        scores = tl.where(keys[None, :] < num_keys, scores, float("-inf"))
    if IS_CAUSAL:
        scores = tl.where(keys[None, :] <= rows[:, None] + offset, scores, float("-inf"))
    return scores


@triton.jit(do_not_specialize=_SIZES)
def forward_kernel(
    Q, K, V, O, L,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, o_batch, o_head, o_row,
    num_heads, group, num_queries, num_keys, offset, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):
    """O and L of one tile of queries of one head; grid (query tiles, batch × heads)."""
    tile, item = _query_tile(IS_CAUSAL), tl.program_id(1)
    batch, head = (item // num_heads).to(tl.int64), (item % num_heads).to(tl.int64)
    Q += batch * q_batch + head * q_head
    K += batch * k_batch + head // group * k_head
    V += batch * v_batch + head // group * v_head
    O += batch * o_batch + head * o_head
    L += item.to(tl.int64) * num_queries

    rows = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    dims = tl.arange(0, BLOCK_D)
    q = _rows_of(Q, q_row, rows, num_queries, dims, HEAD_DIM, False)
    maximum = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    scale *= LOG2_E

    whole, seen = _keys_to_visit(tile, num_keys, offset, BLOCK_Q, BLOCK_K, IS_CAUSAL)
    for start in range(0, whole, BLOCK_K):
        acc, total, maximum = _meet(
            acc, total, maximum, q, K, V, k_row, v_row, start, rows, dims, num_keys, offset, scale,
            HEAD_DIM, BLOCK_D, BLOCK_K, False, False, PRECISION,
        )
    for start in range(whole, seen, BLOCK_K):
        acc, total, maximum = _meet(
            acc, total, maximum, q, K, V, k_row, v_row, start, rows, dims, num_keys, offset, scale,
            HEAD_DIM, BLOCK_D, BLOCK_K, True, IS_CAUSAL, PRECISION,
        )

    unseen = total == 0.0
    out = acc / tl.where(unseen, 1.0, total)[:, None]
    logsumexp = tl.where(unseen, float("-inf"), (maximum + tl.log2(tl.where(unseen, 1.0, total))) * LN_2)
    is_row = rows < num_queries
    tl.store(L + rows, logsumexp, mask=is_row)
    tl.store(
        O + rows[:, None] * o_row + dims[None, :],
        out.to(O.dtype.element_ty),
        mask=is_row[:, None] & (dims[None, :] < HEAD_DIM),
    )


@triton.jit
def _meet(
    acc, total, maximum, q, K, V, k_row, v_row, start, rows, dims, num_keys, offset, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr, IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):
    """A tile of queries meets a tile of keys: the new accumulator, sum and maximum."""
    keys = start + tl.arange(0, BLOCK_K)
    EVEN: tl.constexpr = (not MASKED) and HEAD_DIM == BLOCK_D
    k = _rows_of(K, k_row, keys, num_keys, dims, HEAD_DIM, EVEN)
    scores = _scores(q, k, rows, keys, num_keys, offset, MASKED, IS_CAUSAL, PRECISION)
    # Scaled after the maximum, so that scaling and shift are one instruction per score.
    larger = tl.maximum(maximum, tl.max(scores, 1) * scale)
    shift = larger
    if MASKED:  # a row that has seen no key so far has no maximum to shift by
        shift = tl.where(larger == float("-inf"), 0.0, larger)
    weights = tl.exp2(scores * scale - shift[:, None])
    rescale = tl.exp2(maximum - shift)
    v = _rows_of(V, v_row, keys, num_keys, dims, HEAD_DIM, EVEN)
    acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
    return acc, total * rescale + tl.sum(weights, 1), larger


@triton.jit(do_not_specialize=_SIZES)
def delta_kernel(
    O, DO, D,
    o_batch, o_head, o_row, do_batch, do_head, do_row,
    num_heads, num_queries,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
):
    """D = rowsum(dO · O), once for both kernels of the backward; grid (query tiles, batch × heads)."""
    tile, item = tl.program_id(0), tl.program_id(1)
    batch, head = (item // num_heads).to(tl.int64), (item % num_heads).to(tl.int64)
    rows, dims = tile * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    out = _rows_of(O + batch * o_batch + head * o_head, o_row, rows, num_queries, dims, HEAD_DIM, False)
    grad = _rows_of(DO + batch * do_batch + head * do_head, do_row, rows, num_queries, dims, HEAD_DIM, False)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(D + item.to(tl.int64) * num_queries + rows, delta, mask=rows < num_queries)


@triton.jit(do_not_specialize=_SIZES)
def grad_key_value_kernel(
    Q, K, V, DO, L, D, DK, DV,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, do_batch, do_head, do_row,
    dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row,
    num_heads, group, num_queries, num_keys, offset, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):
    """dK and dV of one tile of keys, over all heads of its group; grid (key tiles, batch × key heads).

    Scores are built transposed, Sᵀ = K Qᵀ, so that dV = Pᵀ dO and dK = dSᵀ Q need no transposed product.
    """
    tile, item = tl.program_id(0), tl.program_id(1)
    key_heads = num_heads // group
    batch, key_head = (item // key_heads).to(tl.int64), (item % key_heads).to(tl.int64)
    keys, dims = tile * BLOCK_K + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    k = _rows_of(K + batch * k_batch + key_head * k_head, k_row, keys, num_keys, dims, HEAD_DIM, False)
    v = _rows_of(V + batch * v_batch + key_head * v_head, v_row, keys, num_keys, dims, HEAD_DIM, False)
    grad_k = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)

    # The first query that sees the first of these keys, and the first tile in which every query sees all of them.
    first = 0
    whole = 0
    if IS_CAUSAL:
        first = tl.maximum(tile * BLOCK_K - offset, 0) // BLOCK_Q * BLOCK_Q
        whole = (tl.maximum((tile + 1) * BLOCK_K - 1 - offset, 0) + BLOCK_Q - 1) // BLOCK_Q * BLOCK_Q
        whole = tl.minimum(whole, (num_queries + BLOCK_Q - 1) // BLOCK_Q * BLOCK_Q)
    for head_of_group in range(0, group):
        head = key_head * group + head_of_group
        q_base = Q + batch * q_batch + head * q_head
        do_base = DO + batch * do_batch + head * do_head
        row_base = (batch * num_heads + head) * num_queries
        for start in range(first, whole, BLOCK_Q):
            grad_k, grad_v = _grad_key_value(
                grad_k, grad_v, k, v, q_base, do_base, L + row_base, D + row_base, q_row, do_row, start, keys, dims,
                num_queries, offset, scale, HEAD_DIM, BLOCK_Q, IS_CAUSAL, PRECISION,
            )
        for start in range(whole, num_queries, BLOCK_Q):
            grad_k, grad_v = _grad_key_value(
                grad_k, grad_v, k, v, q_base, do_base, L + row_base, D + row_base, q_row, do_row, start, keys, dims,
                num_queries, offset, scale, HEAD_DIM, BLOCK_Q, False, PRECISION,
            )
    mask = (keys[:, None] < num_keys) & (dims[None, :] < HEAD_DIM)
    DK += batch * dk_batch + key_head * dk_head
    DV += batch * dv_batch + key_head * dv_head
    tl.store(DK + keys[:, None] * dk_row + dims[None, :], (grad_k * scale).to(DK.dtype.element_ty), mask=mask)
    tl.store(DV + keys[:, None] * dv_row + dims[None, :], grad_v.to(DV.dtype.element_ty), mask=mask)


@triton.jit
def _grad_key_value(
    grad_k, grad_v, k, v, Q, DO, L, D, q_row, do_row, start, keys, dims, num_queries, offset, scale,
    HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):
    """A tile of keys meets a tile of queries: what that adds to dK (unscaled) and dV."""
    rows = start + tl.arange(0, BLOCK_Q)
    q = _rows_of(Q, q_row, rows, num_queries, dims, HEAD_DIM, False)
    grad_out = _rows_of(DO, do_row, rows, num_queries, dims, HEAD_DIM, False)
    # Rows beyond the end and rows that see no key have weights 0: exp2(… − ∞).
    logsumexp = tl.load(L + rows, mask=rows < num_queries, other=float("inf"))
    logsumexp = tl.where(logsumexp == float("-inf"), float("inf"), logsumexp)
    delta = tl.load(D + rows, mask=rows < num_queries, other=0.0)
    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2_E)
    if IS_CAUSAL:
        scores = tl.where(keys[:, None] <= rows[None, :] + offset, scores, float("-inf"))
    weights = tl.exp2(scores - (logsumexp * LOG2_E)[None, :])
    grad_v = tl.dot(weights.to(grad_out.dtype), grad_out, grad_v, input_precision=PRECISION)
    grad_weights = tl.dot(v, tl.trans(grad_out), input_precision=PRECISION)
    grad_scores = weights * (grad_weights - delta[None, :])
    grad_k = tl.dot(grad_scores.to(q.dtype), q, grad_k, input_precision=PRECISION)
    return grad_k, grad_v


@triton.jit(do_not_specialize=_SIZES)
def grad_query_kernel(
    Q, K, V, DO, L, D, DQ,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, do_batch, do_head, do_row,
    dq_batch, dq_head, dq_row,
    num_heads, group, num_queries, num_keys, offset, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):
    """dQ of one tile of queries; grid (query tiles, batch × heads)."""
    tile, item = _query_tile(IS_CAUSAL), tl.program_id(1)
    batch, head = (item // num_heads).to(tl.int64), (item % num_heads).to(tl.int64)
    rows, dims = tile * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    q = _rows_of(Q + batch * q_batch + head * q_head, q_row, rows, num_queries, dims, HEAD_DIM, False)
    grad_out = _rows_of(DO + batch * do_batch + head * do_head, do_row, rows, num_queries, dims, HEAD_DIM, False)
    is_row = rows < num_queries
    logsumexp = tl.load(L + item.to(tl.int64) * num_queries + rows, mask=is_row, other=float("inf"))
    logsumexp = tl.where(logsumexp == float("-inf"), float("inf"), logsumexp) * LOG2_E
    delta = tl.load(D + item.to(tl.int64) * num_queries + rows, mask=is_row, other=0.0)
    K += batch * k_batch + head // group * k_head
    V += batch * v_batch + head // group * v_head
    grad_q = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)

    whole, seen = _keys_to_visit(tile, num_keys, offset, BLOCK_Q, BLOCK_K, IS_CAUSAL)
    for start in range(0, whole, BLOCK_K):
        grad_q = _grad_query(
            grad_q, q, grad_out, logsumexp, delta, K, V, k_row, v_row, start, rows, dims, num_keys, offset, scale,
            HEAD_DIM, BLOCK_D, BLOCK_K, False, False, PRECISION,
        )
    for start in range(whole, seen, BLOCK_K):
        grad_q = _grad_query(
            grad_q, q, grad_out, logsumexp, delta, K, V, k_row, v_row, start, rows, dims, num_keys, offset, scale,
            HEAD_DIM, BLOCK_D, BLOCK_K, True, IS_CAUSAL, PRECISION,
        )
    tl.store(
        DQ + batch * dq_batch + head * dq_head + rows[:, None] * dq_row + dims[None, :],
        (grad_q * scale).to(DQ.dtype.element_ty),
        mask=is_row[:, None] & (dims[None, :] < HEAD_DIM),
    )


@triton.jit
def _grad_query(
    grad_q, q, grad_out, logsumexp, delta, K, V, k_row, v_row, start, rows, dims, num_keys, offset, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr, IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):
    """A tile of queries meets a tile of keys: what that adds to dQ (unscaled)."""
    keys = start + tl.arange(0, BLOCK_K)
    EVEN: tl.constexpr = (not MASKED) and HEAD_DIM == BLOCK_D
    k = _rows_of(K, k_row, keys, num_keys, dims, HEAD_DIM, EVEN)
    v = _rows_of(V, v_row, keys, num_keys, dims, HEAD_DIM, EVEN)
    scores = _scores(q, k, rows, keys, num_keys, offset, MASKED, IS_CAUSAL, PRECISION)
    weights = tl.exp2(scores * (scale * LOG2_E) - logsumexp[:, None])
    grad_weights = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
    grad_scores = weights * (grad_weights - delta[:, None])
    return tl.dot(grad_scores.to(k.dtype), k, grad_q, input_precision=PRECISION)
