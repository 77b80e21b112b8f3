"""Small trained tokenizers with special tokens for chat templates, and what an encoded row's targets say."""

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
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


WORDS = (
    "Is water wet? Yes, it is. No. Two and two are four. Let me look. It rains in Oslo today. Weather of a city. "
    "Hello there, how are you? Fine, and you? Be brief. rain ask answer first second assistant user system tool"
)


@cache
def _trained(kind: str, special: tuple[str, ...]) -> str:
    """Train a tokenizer whose tokens are whole words with the blank before them; return it as JSON."""
    if kind == "gpt2":
        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    else:
        inner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        if kind == "metaspace":
            inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
        else:
            inner.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        inner.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=names, show_progress=False)
    words = [WORDS] if kind != "llama2" else [word + " " for word in WORDS.split()]
    inner.train_from_iterator(words * 4, trainer)
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return str(inner.to_str())


def make_trained_tokenizer(
    kind: str, special: Sequence[str], chat_template: str | None = None, **options: Any
) -> "protocols.Tokenizer":
    """Make a tokenizer of whole words: `gpt2` (byte-level BPE), `metaspace` or `llama2` (both as SentencePiece).

    `llama2` puts a blank before each text between special tokens, and its tokens may reach over several words.
    `options` replace the names of its special tokens.
    """
    tokens = tuple(dict.fromkeys(["<bos>", "<eos>", "<pad>", *options.values(), *special]))
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", **options}
    tokenizer: protocols.Tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(kind, tokens)),
        additional_special_tokens=[token for token in tokens if token not in names.values()],
        **names,
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
