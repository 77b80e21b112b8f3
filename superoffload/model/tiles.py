"""How many tokens a tile of the MLP holds. Pure; imports no torch."""

from typing import Literal


def tile_tokens(tokens: int, hidden: int, tiles: int | Literal["auto"]) -> int:
    """Return the most tokens of a tile for `--tiled_mlp` `tiles` (0: untiled) and `tokens` tokens of width `hidden`.

    `auto` makes ceil(tokens / hidden) tiles, so that the activations of a tile take about as much memory as the
    weights do: Arctic Long Sequence Training, arXiv:2506.13996, section 3.2.2; DeepSpeed, ulysses_sp.py, TiledMLP.
    """
    count = -(-tokens // hidden) if isinstance(tiles, str) else min(tiles, tokens)
    return -(-tokens // max(1, count))
