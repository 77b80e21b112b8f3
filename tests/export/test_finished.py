"""A model that is loaded straight from its checkpoint is the one that was trained, as its export is."""

import pytest
import torch

from superoffload.use import finished
from tests.helpers.exports import KINDS, STEPS, Trained, same_answers


@pytest.mark.parametrize("kind", KINDS)
def test_the_answers_are_those_of_the_run(kind: str, trained: dict[str, Trained]) -> None:
    run = trained[kind]
    source = finished.find(str(run.output_dir))
    assert source.title == f"{run.output_dir} (step {STEPS})"
    assert source.run is not None and source.run.model.model_name == str(run.original)
    assert same_answers(finished.load_model(source, torch.device("cpu")), run)
