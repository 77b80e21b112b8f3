"""What the data tests share: a cache of their own and a small tokenizer."""

import json
import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<eos>", "<pad>", "<|start|>", "<|end|>", "<|return|>"]
CORPUS = [
    "### Instruction:\nName three colours.\n\n### Input:\nwarm ones\n\n### Response:\nRed, orange and yellow.",
    "### System:\nBe brief.\n\n### User:\nhello\n\n### Assistant:\nhi there",
    "system user assistant tool\n<think>\n\n</think>\n\n",
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_tokenizer(**options):
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    names = {"eos_token": "<eos>", "pad_token": "<pad>", **options}
    return PreTrainedTokenizerFast(tokenizer_object=inner, additional_special_tokens=SPECIAL[2:], **names)


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def jsonl(tmp_path):
    """Return a function that writes records (or raw bytes) as JSON lines and returns the file's name."""

    def write(rows, name="rows.jsonl"):
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        (tmp_path / name).write_bytes(b"\n".join(lines) + b"\n")
        return str(tmp_path / name)

    return write


def targets(encoded, tokenizer):
    """Decode the runs of target tokens of an encoded row."""
    runs, current = [], []
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        if label == -100:
            if current:
                runs.append(tokenizer.decode(current))
            current = []
        else:
            assert token == label
            current.append(token)
    return runs + ([tokenizer.decode(current)] if current else [])


@pytest.fixture
def decoded_targets(tokenizer):
    return lambda encoded: targets(encoded, tokenizer)
