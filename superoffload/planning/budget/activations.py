"""Shape and job -> bytes of a forward and backward that come and go. Pure arithmetic; imports no torch.

Everything is in bf16 but what transformers and torch compute in float32: norms, softmax, the loss. h is the hidden
size, q and k the width of all queries and of all keys, I the inner width of the MLP. The formulas were checked by
counting the storages of such steps on the meta device (tests/benchmarks/plan_device.py). Rows are full, and all tokens
are targets. Packs attend with a flash kernel, whose sizes do not depend on the documents; rows that are not packed have
a mask, with which torch takes another kernel.
"""

from superoffload.model.tiles import tile_tokens
from superoffload.planning.budget.job import Job
from superoffload.planning.budget.shape import Shape

TILE = 2**24  # logits that the chunked loss holds at a time: model/head.py, TILE
INPUTS_ON_DEVICE = 1  # of layers, with `--activation_checkpointing offload`: model/recomputation.py, HostStates
TILE_BYTES = 10 * TILE  # a tile in float32 and in bf16, and a product with the weight in float32: head._Tiles


def layer_input_bytes(shape: Shape) -> int:
    """Return what activation checkpointing keeps per token and layer: its input in bf16."""
    return 2 * shape.hidden


def kept_bytes(shape: Shape, job: Job) -> int:
    """Return what the forward of one layer keeps for its backward, per token.

    Norms: 2 (4 h + 2 h + 2 h), the input in float32, the normalised states, the result (transformers, LlamaRMSNorm).
    Attention: queries, keys and values after their rotation, and the result; see `_attention_bytes`. MLP: gate, up,
    activation and product, 8 I, of each expert (LlamaMLP); in gpt-oss 14 I, because of its clamps
    (GptOssExperts._apply_gate). Experts also keep their inputs sorted and their outputs, 4 h each
    (transformers/integrations/moe.py, grouped_mm_experts_forward). In tiles, the MLP keeps its input alone, which is
    the result of a norm.
    """
    return 16 * shape.hidden + _attention_bytes(shape, job) + (0 if tiles(shape, job) else mlp_bytes(shape))


def mlp_bytes(shape: Shape) -> int:
    """Return what the forward of an MLP keeps per token."""
    return (14 if shape.sinks else 8) * shape.intermediate + _sorted_bytes(shape, 4)


def layer_bytes(shape: Shape, job: Job) -> int:
    """Return the most that the backward of one layer holds per token, with what its forward kept.

    The largest of three moments. MLP: the gradients of its result, of gate, up and product beside all that was kept
    (the product itself is gone by then); with experts those of the sorted outputs. Attention: of the scores there are
    the softmax, its gradient and the result's, in float32 (eager_attention_forward), in gpt-oss in bf16, when the
    forward computes them; a flash kernel has one gradient in float32 and widened ones of keys and values
    (torch's flash_attn/flash_api.cpp, mha_bwd: dq_accum, dk_expanded, dv_expanded). Norm: 34 h, in float32 mostly.
    """
    queries, keys = _widths(shape)
    mlp = _mlp_gradient_bytes(shape) if not tiles(shape, job) else 4 * shape.hidden
    if job.eager:
        running = 8 * queries + (6 if shape.sinks else 12) * shape.heads * job.length
    elif job.packed:
        running = 4 * (queries + keys) + 2 * (queries + 2 * keys) + 10 * queries
    else:
        running = 8 * queries + 10 * queries
    attention = 14 * shape.hidden + running
    return max(
        kept_bytes(shape, job) + mlp,
        attention + _head_norm_bytes(shape),
        34 * shape.hidden + _attention_bytes(shape, job),
    )


def _mlp_gradient_bytes(shape: Shape) -> int:
    return 2 * shape.hidden + max(4 * shape.intermediate, _sorted_bytes(shape, 6))


def tiles(shape: Shape, job: Job) -> int:
    """Return the tokens of a tile of an MLP, 0 if it is not tiled."""
    size = tile_tokens(job.tokens, shape.hidden, job.tiled)
    return size if size < job.tokens else 0


def mlp_elements(shape: Shape) -> int:
    """Return the elements of an MLP's weights: three matrices, or those of a sparse block."""
    return shape.unit if shape.experts_per_token > 1 else 3 * shape.hidden * shape.intermediate


def tile_bytes(shape: Shape, job: Job) -> int:
    """Return the most that the backward of a tiled MLP holds, beside what its layer has kept (model/tiled_mlp.py).

    The gradients of its output and of its input, the sums of the weights' gradients in float32, and the larger of two
    moments of a tile: with all its activations, the gradient of the last weight, a third of them; then those of all
    weights, beside the gradients of gate and up.
    """
    weights, tile = mlp_elements(shape), tiles(shape, job)
    first = (mlp_bytes(shape) + _mlp_gradient_bytes(shape)) * tile + 2 * weights // 3
    last = 4 * (shape.intermediate + shape.hidden) * tile + 2 * weights
    return 4 * shape.hidden * job.tokens + 4 * weights + max(first, last)


def layer_gradient_bytes(shape: Shape) -> int:
    """Return the gradients of activations per token while those of an MLP's last weights are computed."""
    return 2 * shape.hidden + _sorted_bytes(shape, 2)


def _widths(shape: Shape) -> tuple[int, int]:
    return shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim


def _attention_bytes(shape: Shape, job: Job) -> int:
    """Return what attention keeps per token.

    A flash kernel keeps queries, keys, values, the result, and 4 bytes per head. Where ranks share a row, the result is
    kept as the kernel computes it and again as the ranks have exchanged it (model/sequence_parallel.py). With a mask,
    there are keys and values for every head (transformers/integrations/sdpa_attention.py, use_gqa_in_sdpa). Attention
    that computes all scores (`eager`) also keeps the softmax: in float32 and bf16, in gpt-oss in bf16 alone.
    """
    queries, keys = _widths(shape)
    norms = _head_norm_bytes(shape)
    if job.eager:
        return norms + 8 * queries + (2 if shape.sinks else 6) * shape.heads * job.length
    exchanged = 2 * queries if job.parts > 1 else 0
    return norms + 4 * (queries + keys if job.packed else 2 * queries) + 4 * shape.heads + exchanged


def mask_bytes(job: Job) -> int:
    """Return the bytes per token of the mask of rows that are not packed, bool or bf16 `[rows, 1, length, length]`."""
    return 0 if job.packed else 2 * job.length


def _head_norm_bytes(shape: Shape) -> int:
    """Return what norms of queries and keys keep per token: the input in float32, and the normalised states."""
    return 6 * sum(_widths(shape)) if shape.head_norms else 0


def _sorted_bytes(shape: Shape, each: int) -> int:
    return each * shape.hidden * shape.experts_per_token if shape.experts_per_token > 1 else 0


def states_bytes(shape: Shape, job: Job) -> int:
    """Return what is kept from the last layer to the loss: the final norm, 6 h, and the states of the targets, 2 h."""
    return 8 * shape.hidden * job.tokens


def loss_bytes(shape: Shape, job: Job) -> int:
    """Return the most that the loss holds, all tokens being targets.

    Chunked: a tile, and in backward the gradient of the head's weight and of the states, the latter in float32
    (model/head.py, _TokenLosses). Plain: the log-softmax, its gradient and that of the logits, each float32
    `[tokens, vocabulary]` (model/head.py, PlainLoss); then the gradient of the head's weight beside that of the
    logits.
    """
    states = states_bytes(shape, job)
    if job.chunked_loss:
        return states + TILE_BYTES + 2 * shape.head + 4 * shape.hidden * job.tokens
    logits = job.tokens * shape.vocabulary
    return states + max(12 * logits, 4 * logits + 2 * shape.head)
