"""Rows of random tokens."""

import numpy as np
import pytest

from superoffload.bench import documents
from superoffload.config import build
from superoffload.data import collate, loader
from superoffload.data.encode import IGNORED

pytestmark = pytest.mark.unit


def test_lengths_are_distributed_as_documented_and_targets_are_the_answers() -> None:
    rows = documents.make(20_000, 1000, 100_000, seed=1)
    answers, prompts = rows.targets, rows.lengths - rows.targets
    assert np.median(answers) == pytest.approx(documents.ANSWER_MEDIAN, rel=0.05)
    assert np.median(prompts) == pytest.approx(documents.TEMPLATE + documents.PROMPT_MEDIAN, rel=0.05)
    assert rows.lengths.mean() == pytest.approx(documents.MEAN, rel=0.05)
    ids, labels = rows.read([7])[0]
    assert len(ids) == len(labels) == rows.lengths[7] and ids.max() < 1000
    assert np.count_nonzero(labels == IGNORED) == prompts[7]
    assert np.array_equal(labels[-answers[7] :], ids[-answers[7] :])


def test_rows_of_other_lengths_are_the_same_ones_truncated() -> None:
    long, short = (documents.make(500, 1000, length, seed=1) for length in (4096, 64))
    assert (short.lengths == np.minimum(long.lengths, 64)).all()
    assert short.targets.min() >= 1
    assert short.counts.truncated == (long.lengths > 64).sum()


@pytest.mark.parametrize(("layout", "packed"), [({}, True), ({"packing": False}, False)])
def test_enough_rows_fill_the_steps(layout: dict[str, bool], packed: bool) -> None:
    values = {"model_name": "m", "output_dir": "o", "max_length": 512, "batch_size": 4, **layout}
    settings = build(values)
    rows = documents.make(documents.enough(4, 512, 10, packed=packed), 1000, 512, seed=1)
    chosen = collate.choose_layout(settings.data, 0, takes_documents=False)
    batches = loader.Batches(rows, chosen, settings.training, rank=0, world_size=1)
    assert batches.packs_in(0) // batches.packs_per_step >= 10


def test_very_many_tokens_are_not_made_at_once() -> None:
    assert documents.enough(1, 2048, 10**6, packed=True) * documents.MEAN < 1.01 * documents.MOST_TOKENS
    assert documents.enough(4096, 2048, 10**6, packed=True) * documents.MEAN > 2 * 4096 * 2048
