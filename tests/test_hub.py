"""What a person is told when the hub does not hand something out: a server on the loopback interface is the hub."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest

from superoffload import hub
from superoffload.data.sources import open_rows
from superoffload.errors import UserError
from superoffload.model import load_config
from superoffload.tokenizer import load_tokenizer
from tests.ranks import free_port

# Status and X-Error-Code of the real hub's answers.
ANSWERS = {
    "/api/models/owner/there/auth-check": (200, ""),
    "/api/models/owner/gated/auth-check": (403, "GatedRepo"),
    "/api/datasets/owner/gated/auth-check": (403, "GatedRepo"),
    "/api/models/owner/ill/auth-check": (500, ""),
}


class Hub(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status, code = ANSWERS.get(self.path, (401, "RepoNotFound"))
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *words: object) -> None:
        """Say nothing."""


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield
        server.shutdown()


def test_what_is_there_passes(served: None) -> None:
    hub.check("model_name", "owner/there", "model", cached=lambda: False)


@pytest.mark.parametrize(
    ("flag", "name", "kind", "words"),
    [
        ("model_name", "owner/gated", "model", "gated; accept its terms on the model's page on the hub, then run"),
        ("dataset_name", "owner/gated", "dataset", "gated; accept its terms on the dataset's page on the hub"),
        ("model_name", "owner/misspelt", "model", "unknown on the hub, or private; check the spelling, or run"),
        ("model_name", "owner/ill", "model", "the hub answered: Server error '500 Internal Server Error'"),
    ],
)
def test_what_is_not_handed_out_is_one_line(served: None, flag: str, name: str, kind: str, words: str) -> None:
    with pytest.raises(UserError) as raised:
        hub.check(flag, name, kind, cached=lambda: False)
    assert str(raised.value).startswith(f"--{flag} {name}: {words}")
    assert "\n" not in str(raised.value)


def test_a_login_is_named_where_one_helps(served: None) -> None:
    for name in ("owner/gated", "owner/misspelt"):
        with pytest.raises(UserError, match="hf auth login"):
            load_tokenizer(name)


def test_a_name_that_cannot_be_one(served: None) -> None:
    for load in (load_config, load_tokenizer, lambda name: open_rows(name, "train")):
        for name in ("owner/na me", "-x-"):
            with pytest.raises(UserError, match="neither a local path nor a name of the form owner/name"):
                load(name)


def test_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(UserError, match="not a local path, and the hub cannot be reached; check the network"):
        hub.check("model_name", "owner/there", "model", cached=lambda: False)


def test_where_the_hub_may_not_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE keeps the hub from being asked; unset it"):
        hub.check("model_name", "owner/there", "model", cached=lambda: False)


@pytest.mark.parametrize("name", ["owner/gated", "owner/misspelt", "owner/ill"])
def test_what_lies_in_the_cache_can_be_used_all_the_same(served: None, name: str) -> None:
    hub.check("model_name", name, "model", cached=lambda: True)
