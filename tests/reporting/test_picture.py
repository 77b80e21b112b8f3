import pytest

from superoffload.reporting import picture
from tests.helpers.ranks import REPOSITORY

pytestmark = pytest.mark.unit


def test_the_picture_of_the_documentation_is_that_of_this_code() -> None:
    """Or else: python -m superoffload.reporting.picture docs/display.svg."""
    assert (REPOSITORY / "docs/display.svg").read_text(encoding="utf-8") == picture.svg()
