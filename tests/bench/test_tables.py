"""The report in Markdown, and the picture."""

from pathlib import Path

import pytest

from superoffload.bench import picture, tables
from tests.helpers.documents import tables as tables_in
from tests.helpers.reports import configuration, report

FAILED = configuration("broken", [], failure="--x 1: a | b; do c", mode="zerooffload")
REPORT = report(configuration("packed", [100.0, 125.0, 80.0]), FAILED, configuration("other", [50.0], batch_size=8))


@pytest.mark.unit
def test_the_tables_have_a_row_for_each_configuration_and_its_failure() -> None:
    text = tables.markdown(REPORT)
    speeds, parts = tables_in(text)
    assert speeds[1][:7] == ["packed", "1,000 ms", "200", "100", "1.000 (1.000-1.000)", "0.2", "0.25"]
    assert speeds[1][-3:] == ["20%", "-", "3.0 GiB"]
    assert "| broken | failed: --x 1: a \\| b; do c |" in text
    assert parts[0] == ["configuration", "data", "forward", "loss", "backward", "optimizer", "upload", "rest"]
    assert parts[1] == ["packed", "10.0", "200.0", "-", "700.0", "50.0", "-", "40.0"]
    assert [row[0] for row in parts[1:]] == ["packed", "other"]


@pytest.mark.unit
def test_the_head_says_what_all_have_in_common_and_how_it_was_measured() -> None:
    text = tables.markdown(REPORT)
    assert "* In common: layout packed, max_length 64," in text and "mode" not in text.split("In common")[1][:200]
    assert "* Model: llama-1b, 1,235.8 M parameters, random weights" in text
    assert "3 rounds of 2 steps, taking turns; one step before each turn and 4 at the start left out" in text
    assert "* Matrix product: bf16, 0.4 TFLOP/s (0.3-0.5)" in text
    alone = tables.markdown({**REPORT, "interleaved": False, "alone_because": "--alone"})
    assert "one configuration after the other (--alone), so that ratios include changes" in alone


@pytest.mark.unit
def test_notes_say_what_was_clipped_or_interrupted() -> None:
    clipped = {**configuration("packed", [1.0]), "clipped_share": 0.25}
    text = tables.markdown(report(clipped, interrupted=True, notes=["DeepSpeed needed a change."]))
    assert text.endswith(
        "* DeepSpeed needed a change.\n* Steps whose gradient was clipped: packed 25%.\n"
        "* Interrupted: this is what had been measured by then.\n"
    )
    nothing = tables.markdown(report({**configuration("packed", []), "failure": None}, product_flops_per_s=None))
    assert "* Matrix product: not measured" in nothing


# Not marked `unit`: on its first import ever, matplotlib runs fc-list to find the fonts.
def test_the_picture_stacks_the_parts_of_each_configuration(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (axes,) = picture.figure(REPORT).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["packed", "other"]
    drawn = {bars.get_label(): [bar.get_width() for bar in bars] for bars in axes.containers}
    assert list(drawn) == ["data", "forward", "backward", "optimizer", "rest"]
    assert drawn["backward"] == pytest.approx([700.0, 1400.0])
    picture.draw({**REPORT, "configurations": [configuration("packed", [])]}, tmp_path / "nothing.png")
    assert list(tmp_path.iterdir()) == []
    picture.draw(REPORT, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes()[:4] == b"\x89PNG"
