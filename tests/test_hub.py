"""Errors of the hub in one line; a server on the loopback interface stands in for the hub."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from superoffload import hub
from superoffload.data.sources import open_rows
from superoffload.errors import UserError
from superoffload.model.load import load_config
from superoffload.model.tokenizer import load_tokenizer
from tests.helpers.ranks import free_port

pytestmark = pytest.mark.unit

# Status and X-Error-Code of the real hub's answers.
ANSWERS = {
    "/api/models/owner/public/auth-check": (200, ""),
    "/api/models/owner/gated/auth-check": (403, "GatedRepo"),
    "/api/datasets/owner/public/auth-check": (200, ""),
    "/api/datasets/owner/gated/auth-check": (403, "GatedRepo"),
    "/api/models/owner/broken/auth-check": (500, ""),
}


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does."""

    def do_GET(self) -> None:
        status, code = ANSWERS.get(self.path, (401, "RepoNotFound"))
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *words: object) -> None:
        """Log nothing."""


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """Start the server once, and return its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow access to the hub, which the test session disables."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def served(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the server the hub."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("gpt2", False), ("owner/name", False), ("owner.x/na.me", False),
        ("./name", True), ("../name", True), (".", True), ("/name", True), ("~/name", True), ("a/b/c", True),
    ],
)  # fmt: skip
def test_which_names_can_only_be_paths(name: str, path: bool) -> None:
    assert hub.looks_like_path(name) is path


def test_a_public_model_passes(served: None) -> None:
    hub.check("model_name", "owner/public", "model", cached=lambda: False)


@pytest.mark.parametrize(
    ("flag", "name", "kind", "words"),
    [
        ("model_name", "owner/gated", "model", "gated; accept its terms on the model's page on the hub, then run"),
        ("dataset_name", "owner/gated", "dataset", "gated; accept its terms on the dataset's page on the hub"),
        ("model_name", "owner/misspelt", "model", "unknown on the hub, or private; check the spelling, or run"),
        ("model_name", "owner/broken", "model", "the hub answered: Server error '500 Internal Server Error'"),
    ],
)
def test_a_refusal_is_one_line(served: None, flag: str, name: str, kind: str, words: str) -> None:
    with pytest.raises(UserError) as raised:
        hub.check(flag, name, kind, cached=lambda: False)
    assert str(raised.value).startswith(f"--{flag} {name}: {words}")
    assert "\n" not in str(raised.value)


def test_a_login_is_advised_if_it_can_help(served: None) -> None:
    for name in ("owner/gated", "owner/misspelt"):
        with pytest.raises(UserError, match="hf auth login"):
            load_tokenizer(name)


def test_an_invalid_name(served: None) -> None:
    for load in (load_config, load_tokenizer, lambda name: open_rows(name, "train")):
        for name in ("owner/na me", "-x-"):
            with pytest.raises(UserError, match="neither a local path nor a name of the form owner/name"):
                load(name)


def test_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(UserError, match="not a local path, and the hub cannot be reached; check the network"):
        hub.check("model_name", "owner/public", "model", cached=lambda: False)


def test_offline_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match="neither a local path nor cached, and HF_HUB_OFFLINE disables access to the hub; unset it"
    ):
        hub.check("model_name", "owner/public", "model", cached=lambda: False)


@pytest.mark.parametrize("name", ["owner/gated", "owner/misspelt", "owner/broken"])
def test_a_cached_name_passes_whatever_the_hub_answers(served: None, name: str) -> None:
    hub.check("model_name", name, "model", cached=lambda: True)


def cache_revisions(folder: Path, model: Path, sizes: dict[str, int]) -> None:
    """Fill a hub cache with revisions of one model, which differ in the number of layers."""
    repository = folder / "models--owner--cached"
    (repository / "refs").mkdir(parents=True)
    for number, (revision, layers) in enumerate(sizes.items()):
        commit = str(number) * 40
        (repository / "refs" / revision).write_text(commit)
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for path in model.iterdir():
            (snapshot / path.name).write_bytes(path.read_bytes())
        described = json.loads((snapshot / "config.json").read_text())
        (snapshot / "config.json").write_text(json.dumps({**described, "num_hidden_layers": layers}))


def test_a_revision_of_a_cached_model(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from superoffload.model import weights

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    cache_revisions(tmp_path, model_folder, {"main": 2, "v1": 5})
    for revision, layers, commit in ((None, 2, "0" * 40), ("v1", 5, "1" * 40)):
        assert load_config("owner/cached", revision).num_hidden_layers == layers
        assert load_tokenizer("owner/cached", revision).eos_token == "<eos>"
        assert weights.commit_of(weights.find("owner/cached", revision)) == f" at commit {commit}"
    with pytest.raises(UserError, match="--model_name owner/cached: neither a local path nor cached"):
        load_config("owner/cached", "v2")


@pytest.mark.parametrize(("name", "revision"), [("owner/public", None), ("owner/public@v1", "v1")])
def test_a_revision_of_a_data_set(
    served: None, name: str, revision: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    asked: list[Any] = []

    def load_dataset(name: str, config: str | None, **options: Any) -> Any:
        asked.append((name, options.get("revision")))
        return datasets.Dataset.from_dict({"text": ["one"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(open_rows(name, "train")) == 1
    assert asked == [("owner/public", revision)]
