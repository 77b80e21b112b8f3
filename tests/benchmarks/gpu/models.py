"""Write a Llama with random weights, a tokenizer and rows: python -m tests.benchmarks.gpu.models PRESET FOLDER."""

import sys
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from superoffload import tiny
from tests.benchmarks.offload_speed import PRESETS, llama_config


def write(preset: str, folder: Path) -> None:
    """Write the model to folder/model in bf16, and the rows of the quick start beside it."""
    tiny.write(folder)
    # The tokens of the tokenizer, and as many positions as any part uses.
    more = {"bos_token_id": None, "eos_token_id": 256, "pad_token_id": 257, "max_position_embeddings": 8192}
    torch.set_default_dtype(torch.bfloat16)
    torch.manual_seed(0)
    LlamaForCausalLM(llama_config(PRESETS[preset], **more)).save_pretrained(folder / "model")


if __name__ == "__main__":
    write(sys.argv[1], Path(sys.argv[2]))
