"""A stand-in for torch's `varlen_attn`, whose kernel needs CUDA."""

from typing import Any

import torch


def reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Any = None,
    block_table: Any = None,
    num_splits: int | None = None,
) -> torch.Tensor:
    """Compute what torch documents of `varlen_attn`, with sdpa and a mask over the pack, for any dtype and device."""
    assert cu_seq_k is not None and cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert max_q == max_k == int(cu_seq_q.diff().max())
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    positions = torch.arange(len(query))
    document = torch.bucketize(positions, cu_seq_q[1:], right=True)
    distance = positions[:, None] - positions
    left, right = (len(query) if side == -1 else side for side in window_size)
    visible = (document[:, None] == document) & (distance <= left) & (-distance <= right)
    q, k, v = (state.transpose(0, 1)[None] for state in (query, key, value))
    attended = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=visible, scale=scale, enable_gqa=enable_gqa
    )
    return attended[0].transpose(0, 1)
