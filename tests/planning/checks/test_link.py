import json

import pytest

from superoffload.planning.checks import link


def test_the_measurement_can_be_rehearsed_without_a_device() -> None:
    rates, locked = link.measure(1 << 16, 2, "cpu")
    assert list(rates) == [link.ARENA, link.PINNED, link.PAGEABLE]
    assert all(rate > 0 for ways in rates.values() for rate in ways.values())
    assert locked


def test_the_rates_of_a_device_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    from superoffload.planning.checks import measure

    measure.device_rates("cpu", numel=1 << 16, side=64)
    lines = [json.loads(line.removeprefix("RESULT ")) for line in capsys.readouterr().out.splitlines()]
    assert [set(line) for line in lines] == [{"rates", "locked"}, {"device_bf16_flops_per_s"}]
    assert lines[1]["device_bf16_flops_per_s"] > 0
