"""`superoffload push`: what is checked, what goes to the hub, and what its answers become."""

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest.mock import Mock, create_autospec

import huggingface_hub
import numpy as np
import pytest
from click.testing import CliRunner
from huggingface_hub import HfApi, errors
from safetensors.numpy import save_file

from superoffload import commands, hub
from superoffload.errors import UserError
from superoffload.export import push
from tests.helpers.ranks import REPOSITORY
from tests.helpers.runs import make_checkpoint

ACCOUNT = hub.Answer(endpoint="https://hub", has_token=True, account="me", problem=None)


def write_export(folder: Path, shards: int = 1) -> Path:
    folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    (folder / "README.md").write_text("# The card\n")
    names = ["model.safetensors"] if shards == 1 else [f"model-{n}-of-{shards}.safetensors" for n in range(shards)]
    for number, name in enumerate(names):
        save_file({f"weight{number}": np.ones(100, np.float32)}, folder / name)
    if shards > 1:
        places = {f"weight{number}": name for number, name in enumerate(names)}
        (folder / push.INDEX).write_text(json.dumps({"weight_map": places}))
    return folder


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Take the place of the hub: what `push` calls, with the signatures of the real HfApi; no repository exists."""
    real, made = HfApi(), Mock(spec_set=["repo_exists", "model_info", "create_repo", "upload_folder"])
    for name in ("repo_exists", "model_info", "create_repo", "upload_folder"):
        setattr(made, name, create_autospec(getattr(real, name)))
    made.repo_exists.return_value = False
    made.upload_folder.return_value = SimpleNamespace(commit_url="https://hub/me/name/commit/1")
    monkeypatch.setattr(push, "HfApi", lambda: made)
    monkeypatch.setattr(hub, "is_offline", lambda: False)
    monkeypatch.setattr(hub, "who_am_i", lambda timeout_s: ACCOUNT)
    return made


def run(*words: Any) -> Any:
    return CliRunner().invoke(commands.group, ["push", *map(str, words)])


@pytest.mark.unit
def test_a_new_repository_is_private(api: Mock, tmp_path: Path) -> None:
    folder = write_export(tmp_path / "model")
    done = run(folder, "owner/name")
    assert (done.exit_code, done.stdout) == (0, "https://hub/me/name/commit/1\n"), done.output
    assert done.stderr == "Uploading 5 files to owner/name as me, as a first revision\n"
    api.create_repo.assert_called_once_with("owner/name", private=True)
    api.upload_folder.assert_called_once_with(
        repo_id="owner/name", folder_path=folder, commit_message="Upload model", delete_patterns=push.OLD_WEIGHTS
    )


@pytest.mark.unit
def test_a_name_alone_belongs_to_the_account(api: Mock, tmp_path: Path) -> None:
    assert run(write_export(tmp_path / "model"), "name", "--public").exit_code == 0
    api.create_repo.assert_called_once_with("me/name", private=False)


@pytest.mark.unit
@pytest.mark.parametrize(
    ("is_private", "flags", "outcome"),
    [(True, [], ""), (True, ["--public"], "stays private"), (False, ["--public"], ""), (False, [], "refused")],
)
def test_a_repository_that_exists_gets_a_revision(
    is_private: bool, flags: list[str], outcome: str, api: Mock, tmp_path: Path
) -> None:
    api.repo_exists.return_value, api.model_info.return_value = True, SimpleNamespace(private=is_private)
    done = run(write_export(tmp_path / "model"), "owner/name", *flags)
    assert not api.create_repo.called
    if outcome == "refused":
        assert str(done.exception).startswith("owner/name: exists and is public; add --public")
        assert not api.upload_folder.called
    else:
        assert done.exit_code == 0 and outcome in done.stderr and "as a new revision" in done.stderr


def test_a_dry_run_shows_files_and_card_without_network_and_torch(tmp_path: Path) -> None:
    folder = write_export(tmp_path / "model", shards=2)
    (folder / ".git").mkdir()
    (folder / ".git" / "config").touch()
    code = (
        "import socket, sys; sys.argv[0] = 'superoffload'; socket.socket.connect = None\n"
        "from superoffload import commands\ntry: commands.main()\nfinally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "push", str(folder), "owner/name", "--dry_run"],
        capture_output=True, text=True, cwd=REPOSITORY, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{folder} -> owner/name (private): 0.00 GB in 7 files\n")
    assert "README.md" in done.stdout and done.stdout.endswith("\n\n# The card\n") and ".git" not in done.stdout


@pytest.mark.unit
def test_of_a_run_the_export_of_the_newest_checkpoint_is_taken(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 10, 1.0)
    checkpoint = make_checkpoint(tmp_path, 20, 2.0)
    target = tmp_path / "model_step20"
    assert push.exported(tmp_path) == push.exported(checkpoint) == (checkpoint, target)
    done = run(tmp_path, "owner/name", "--export", "--dry_run")
    assert f"its checkpoint is not exported; add --export, or run: superoffload export {checkpoint}" in str(
        done.exception
    )
    write_export(target)
    assert push.exported(tmp_path) == (None, target)
    assert push.exported(tmp_path / "global_step10") == (tmp_path / "global_step10", tmp_path / "model_step10")
    with pytest.raises(UserError, match="neither an exported model nor a run with a checkpoint"):
        push.exported(tmp_path / "missing")


def truncated(folder: Path) -> str:
    (folder / "model-1-of-2.safetensors").write_bytes((folder / "model-1-of-2.safetensors").read_bytes()[:-8])
    return "model-1-of-2.safetensors: missing, damaged or truncated"


def shard_missing(folder: Path) -> str:
    (folder / "model-0-of-2.safetensors").unlink()
    return "model-0-of-2.safetensors: missing, damaged or truncated"


def other_tensors(folder: Path) -> str:
    save_file({"other": np.ones(3, np.float32)}, folder / "model-0-of-2.safetensors")
    return "model-0-of-2.safetensors: has other tensors than model.safetensors.index.json says"


def index_damaged(folder: Path) -> str:
    (folder / push.INDEX).write_text("{")
    return "model.safetensors.index.json: damaged"


def no_tokenizer(folder: Path) -> str:
    (folder / "tokenizer_config.json").unlink()
    return "has no tokenizer_config.json; export the model again"


@pytest.mark.unit
@pytest.mark.parametrize("damage", [truncated, shard_missing, other_tensors, index_damaged, no_tokenizer])
def test_an_incomplete_export_is_refused(damage: Any, tmp_path: Path) -> None:
    folder = write_export(tmp_path / "model", shards=2)
    assert len(push.prepare(folder, "owner/name", private=True).files) == 7
    text = damage(folder)
    with pytest.raises(UserError) as raised:
        push.prepare(folder, "owner/name", private=True)
    assert text in str(raised.value)


@pytest.mark.unit
@pytest.mark.parametrize("name", ["https://huggingface.co/owner/name", "a/b/c", "-name"])
def test_the_name_of_the_repository(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must be of the form owner/name"):
        push.prepare(write_export(tmp_path / "model"), name, private=True)


@pytest.mark.unit
@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"account": None, "has_token": False}, "you are not logged in; run `hf auth login`"),
        ({"account": None}, "the token is not valid"),
        ({"account": None, "problem": "no route"}, "cannot be asked who is logged in (no route)"),
    ],
)
def test_who_is_logged_in(
    changes: dict[str, Any], text: str, api: Mock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"endpoint": "https://hub", "has_token": True, "account": "me", "problem": None, **changes}
    monkeypatch.setattr(hub, "who_am_i", lambda timeout_s: hub.Answer(**values))
    done = run(write_export(tmp_path / "model"), "owner/name")
    assert text in str(done.exception) and not api.upload_folder.called


@pytest.mark.unit
@pytest.mark.parametrize(
    ("error", "text"),
    [
        (errors.HfHubHTTPError("no", response=Mock(status_code=403)), "the hub refuses it; use a token that may write"),
        (errors.HfHubHTTPError("no", response=Mock(status_code=500)), "the hub answered: no"),
        (errors.HTTPError("no route"), "the upload failed (no route); the same command resumes it"),
    ],
)
def test_what_the_hub_refuses_is_one_line(error: Exception, text: str, api: Mock, tmp_path: Path) -> None:
    api.upload_folder.side_effect = error
    done = run(write_export(tmp_path / "model"), "owner/name")
    assert isinstance(done.exception, UserError) and f"owner/name: {text}" in str(done.exception)


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does to the upload of small files into a new repository, and keeps what it is sent."""

    sent: ClassVar[dict[str, str]] = {}

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        known: dict[str, Any] = {"/api/whoami-v2": {"name": "me"}}
        if "/api/repos/create" in self.sent:
            known |= {"/api/models/me/name/tree/main": [], "/api/models/me/name/revision/main": {"id": "me/name"}}
        self._answer(*((200, known[path]) if path in known else (404, {})))

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.sent[self.path] = text
        if self.path.endswith("/preupload/main"):
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for file in json.loads(text)["files"]]  # fmt: skip
            self._answer(200, {"files": files})
        else:
            self._answer(200, {"url": "https://huggingface.co/me/name", "name": "me/name", "commitUrl": "https://huggingface.co/me/name/commit/1",
                               "commitOid": "1"})  # fmt: skip

    def _answer(self, status: int, body: Any) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("X-Error-Code", "RepoNotFound" if status == 404 else "")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *words: object) -> None:
        """Log nothing."""


@pytest.mark.unit
def test_the_real_client_creates_a_private_repository_and_commits_every_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        monkeypatch.setattr(push, "HfApi", lambda: HfApi(endpoint=address))
        done = run(write_export(tmp_path / "model"), "me/name")
        server.shutdown()
    assert done.exit_code == 0, done.exception
    created = json.loads(Hub.sent["/api/repos/create"])
    assert created["name"] == "name" and (created.get("private") or created.get("visibility") == "private")
    lines = [json.loads(line) for line in Hub.sent["/api/models/me/name/commit/main"].splitlines()]
    assert {line["value"]["path"] for line in lines[1:]} == {path.name for path in (tmp_path / "model").iterdir()}
