"""The loss of each source: from both kernels, over ranks, through a save, and in the trackers."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from superoffload import config, distributed
from superoffload.data import loader
from superoffload.data.collate import Batch, Layout, TargetsBySource, collate, following, targets_by_source
from superoffload.data.encode import IGNORED
from superoffload.model import attention, loss_kernel
from superoffload.model.head import PlainLoss, sums_by_source
from superoffload.training import evaluation, metrics
from superoffload.training.progress import Progress
from superoffload.training.source_losses import SourceLosses
from superoffload.training.trackers import names
from superoffload.training.trackers.json_lines import to_json
from tests.helpers.packs import DOCUMENTS, PACKED, PADDED, VARLEN, make_engine, tiny
from tests.helpers.ranks import run_ranks
from tests.helpers.tokenizers import make_chat_tokenizer
from tests.training.test_metrics import SHAPE

SOURCES = [1, 0, 0, 2]  # of the documents
TARGETS = [7, 0, 12, 7]


def batch_of(layout: Layout, sources: list[int] | None) -> Batch:
    packs = [DOCUMENTS[:2], DOCUMENTS[2:]] if layout.packs else [[document] for document in DOCUMENTS]
    by_source = None if sources is None else targets_by_source(torch.tensor(sources).numpy(), TARGETS, 4)  # type: ignore[arg-type]
    return collate(packs, len(packs), layout, by_source)


@pytest.mark.unit
@pytest.mark.parametrize("layout", [PACKED, PADDED, VARLEN], ids=["packed", "padded", "varlen"])
@pytest.mark.parametrize("kernel", ["plain", "chunked"])
def test_both_kernels_sum_the_losses_of_each_source(
    kernel: str, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "all_ranks_ok", lambda ok: ok)
    engine = make_engine(tiny("llama", attention.SDPA_VARLEN if layout.varlen else "eager"))
    loss = loss_kernel.choose(kernel, engine, layout)
    reference = make_engine(tiny("llama", "eager"))
    with torch.no_grad():
        alone = [float(PlainLoss()(reference, collate([[document]], 1, PADDED))) for document in DOCUMENTS]
    losses: Any = loss(engine, batch_of(layout, SOURCES))
    expected = [alone[1] + alone[2], alone[0], alone[3], 0.0]
    assert losses.dtype == torch.float32
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)

    losses.sum().backward()
    head = engine.module.get_output_embeddings().weight
    found = head.grad.clone()
    engine.zero_grad()
    together: Any = loss(engine, batch_of(layout, None))
    together.backward()
    assert torch.equal(found, head.grad)  # the gradient is that of the sum, to the last bit


@pytest.mark.unit
@pytest.mark.parametrize("kernel", ["plain", "chunked"])
def test_a_micro_batch_without_targets(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "all_ranks_ok", lambda ok: ok)
    engine = make_engine(tiny("llama", "eager"))
    loss = loss_kernel.choose(kernel, engine, PADDED)
    nothing = torch.zeros(0, dtype=torch.int64).numpy()
    losses: Any = loss(engine, collate([], 2, PADDED, targets_by_source(nothing, nothing, 3)))
    losses.sum().backward()
    assert losses.tolist() == [0.0, 0.0, 0.0]
    assert engine.module.get_output_embeddings().weight.grad.abs().max() == 0


def make_batch(counts: tuple[int, ...]) -> Batch:
    inputs = {"input_ids": torch.zeros((1, 80), dtype=torch.int64)}
    order = torch.arange(sum(counts))
    return Batch(inputs=inputs, lengths=(30, 10), target_tokens=sum(counts), by_source=TargetsBySource(order, counts))


def make_meter(state: dict[str, Any] | None = None, sources: tuple[str, ...] = ("a", "x/b")) -> metrics.Meter:
    chosen = config.build({"model_name": "m", "output_dir": "o"})
    made = metrics.Meter(chosen, SHAPE, state, clock=iter(range(1000)).__next__, sources=sources)
    made.start()
    return made


def add(made: metrics.Meter, counts: tuple[int, int], losses: tuple[float, float]) -> None:
    made.add(make_batch(counts), torch.tensor(losses))
    made.end_step()


def read(made: metrics.Meter) -> metrics.StepMetrics:
    return made.read(Progress(step=1), lr=1.0, grad_norm=1.0, packs_per_epoch=1)


def test_a_logged_step_has_the_mean_of_each_source(one_rank: None) -> None:
    made = make_meter()
    add(made, (10, 30), (20.0, 30.0))
    add(made, (10, 0), (40.0, 0.0))
    numbers = read(made)
    values = numbers.as_dict()
    assert list(values)[-4:] == ["loss/a", "loss/x/b", "target_tokens/a", "target_tokens/x/b"]
    assert list(values.values())[-4:] == [3.0, 1.0, 20, 30]
    assert values["loss"] == pytest.approx(90 / 50)
    assert numbers.line().endswith(" | loss/a: 3.0000 | loss/x/b: 1.0000")
    add(made, (0, 5), (0.0, 10.0))  # the next interval, in which one source has no targets
    values = read(made).as_dict()
    assert math.isnan(values["loss/a"]) and values["loss/x/b"] == 2.0
    assert (values["target_tokens/a"], values["target_tokens/x/b"]) == (0, 5)


def test_one_source_has_no_numbers_of_its_own(one_rank: None) -> None:
    made = make_meter(sources=())
    made.add(Batch(inputs=make_batch((1, 1)).inputs, lengths=(3,), target_tokens=2), torch.tensor(4.0))
    made.end_step()
    assert set(made.state()) == {"interval", "loss_sum", "last_loss"}
    assert not any("/" in key for key in read(made).as_dict())


def own_ids(_: Any, batch: Batch) -> torch.Tensor:
    """Stand in for a loss: the loss of a target token is its number in the vocabulary."""
    labels = following(batch.inputs["labels"]).flatten()
    return sums_by_source(labels[labels != IGNORED].double(), batch)


@pytest.mark.parametrize("layout", [PACKED, PADDED], ids=["packed", "padded"])
def test_the_held_out_loss_of_each_source(layout: Layout, one_rank: None, tmp_path: Path) -> None:
    for name, answer in (("a", "yes"), ("b", "no, never")):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"prompt": "q", "completion": "{answer}"}}\n' * 10)
    names = (str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"))
    settings = config.DataSettings(dataset_name=names, max_length=64, eval_percentage=30)
    _, held_out = loader.load(make_chat_tokenizer(), settings, 0)
    assert held_out is not None
    batches = loader.Batches(held_out, layout, config.TrainingSettings(), rank=0, world_size=1)
    numbers = evaluation.held_out_loss(None, own_ids, batches)  # type: ignore[arg-type]
    every: list[int] = []
    for label, rows in held_out.by_source().items():
        labels = [row[1:] for _, row in rows.read(list(range(len(rows))))]
        targets = [int(token) for row in labels for token in row if token != IGNORED]
        assert numbers[f"eval_target_tokens/{label}"] == len(targets) > 3
        assert numbers[f"eval_loss/{label}"] == pytest.approx(sum(targets) / len(targets))
        every += targets
    assert numbers["eval_loss"] == pytest.approx(sum(every) / len(every))
    assert numbers["eval_loss/a"] != pytest.approx(numbers["eval_loss/b"])


def read_on_two_ranks() -> dict[str, Any]:
    made = make_meter()
    add(made, *(((10, 0), (20.0, 0.0)), ((10, 40), (60.0, 40.0)))[distributed.rank()])
    return read(made).as_dict()


def test_the_sums_are_those_of_all_ranks() -> None:
    for values in run_ranks(2, read_on_two_ranks):
        assert (values["loss/a"], values["loss/x/b"]) == (4.0, 1.0)
        assert (values["target_tokens/a"], values["target_tokens/x/b"]) == (20, 40)
        assert values["loss"] == 2.0


def test_an_open_interval_continues_after_a_resume(one_rank: None) -> None:
    first = make_meter()
    add(first, (10, 30), (20.0, 30.0))
    state = first.state()
    assert state["sources"] == {"a": (20.0, 10.0), "x/b": (30.0, 30.0)}
    second = make_meter(state)
    add(second, (10, 0), (40.0, 0.0))
    values = read(second).as_dict()
    assert (values["loss/a"], values["loss/x/b"], values["loss"]) == (3.0, 1.0, 90 / 50)
    other = make_meter(state, sources=("x/b", "new"))  # resumed with other sources, by --resume_anyway
    add(other, (10, 5), (10.0, 10.0))
    values = read(other).as_dict()
    assert (values["loss/x/b"], values["loss/new"]) == (1.0, 2.0)


def test_numbers_of_sources_reach_both_trackers(tmp_path: Path) -> None:
    values = {"loss/a": 1.0, "target_tokens/x/b": 2, "eval_loss/a": None}
    assert list(names.headed(values)) == ["loss/a", "target_tokens/x/b", "eval/loss/a"]
    assert names.numbers(values) == {"loss/a": 1.0, "target_tokens/x/b": 2.0}
    assert to_json({"loss/a": math.nan}) == '{"loss/a": null}'


def test_without_sources_nothing_is_added(one_rank: None) -> None:
    losses = SourceLosses(())
    losses.add(make_batch((1, 1)), torch.tensor(2.0))
    assert (losses.take().tolist(), losses.numbers([]), losses.state()) == ([], {}, {})
