"""A small trained tokenizer with special tokens for chat templates, and what an encoded row's targets say."""

from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from superoffload.data.encode import IGNORED, Encoded

if TYPE_CHECKING:
    from superoffload import protocols

SPECIAL = ["<eos>", "<pad>", "<|start|>", "<|end|>", "<|return|>"]
CORPUS = [
    "### Instruction:\nName three colours.\n\n### Input:\nwarm ones\n\n### Response:\nRed, orange and yellow.",
    "### System:\nBe brief.\n\n### User:\nhello\n\n### Assistant:\nhi there",
    "system user assistant tool\n<think>\n\n</think>\n\n",
]


def make_chat_tokenizer(chat_template: str | None = None, **options: Any) -> "protocols.Tokenizer":
    """Train a byte-level BPE tokenizer on a few lines; `options` replace the names of its special tokens."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    names = {"eos_token": "<eos>", "pad_token": "<pad>", **options}
    tokenizer: protocols.Tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, additional_special_tokens=SPECIAL[2:], **names
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def decode_targets(encoded: Encoded, tokenizer: "protocols.Tokenizer") -> list[str]:
    """Decode each run of consecutive targets of an encoded row."""
    runs: list[str] = []
    current: list[int] = []
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        if label == IGNORED:
            if current:
                runs.append(tokenizer.decode(current))
            current = []
        else:
            assert token == label
            current.append(token)
    return runs + ([tokenizer.decode(current)] if current else [])
