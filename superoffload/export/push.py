"""Upload an exported model to the hub: checked first, private unless asked otherwise, and shown by a dry run."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, errors
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects, validate_repo_id
from safetensors import SafetensorError, safe_open

from superoffload import hub
from superoffload.checkpoint import manifest
from superoffload.errors import UserError, first_line

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
CARD = "README.md"
OLD_WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
ANSWER_S = 20.0
"""How long to wait for the hub to say who is logged in."""
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """What would go to the hub: the folder of a complete export, its files and their bytes, the name and visibility."""

    folder: Path
    files: dict[str, int]
    repo: str
    private: bool

    def lines(self) -> list[str]:
        """Say what would go."""
        card = (self.folder / CARD).read_text(encoding="utf-8") if CARD in self.files else "(none)"
        sizes = [f"  {size:>15,}  {name}" for name, size in self.files.items()]
        where = f"{self.repo} ({'private' if self.private else 'public'})"
        total = f"{sum(self.files.values()) / 1e9:.2f} GB in {len(self.files)} files"
        return [f"{self.folder} -> {where}: {total}", *sizes, "", f"The model card, {CARD}:", "", card.rstrip()]


def exported(source: Path) -> tuple[Path | None, Path]:
    """Find the export of a run or a checkpoint, or take `source` as one.

    Returns the checkpoint that has to be exported first, if any, and the folder of the export. Raises `UserError` if
    `source` is neither.
    """
    if (source / WEIGHTS).is_file() or (source / INDEX).is_file():
        return None, source
    tag = manifest.read_latest(source)
    checkpoint = source / tag if tag else source
    described = manifest.read(checkpoint)
    if described is None:
        raise UserError(f"{source}: neither an exported model nor a run with a checkpoint; use one of these")
    target = checkpoint.resolve().parent / f"model_step{described['progress'].get('step')}"
    if target.is_dir():
        return None, target
    return checkpoint, target


def prepare(folder: Path, repo: str, private: bool) -> Upload:
    """Check the export and the name, and list the files. Raises `UserError`; uses no network."""
    try:
        validate_repo_id(repo)
    except errors.HFValidationError as error:
        raise UserError(f"{repo}: not the name of a repository; it must be of the form owner/name") from error
    _check_complete(folder)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    kept = filter_repo_objects(names, ignore_patterns=DEFAULT_IGNORE_PATTERNS)  # as `upload_folder` does
    files = {name: (folder / name).stat().st_size for name in kept}
    return Upload(folder=folder, files=files, repo=repo, private=private)


def _check_complete(folder: Path) -> None:
    """Raise `UserError` unless configuration, tokenizer and all weights are there, each file as long as it says."""
    for name in ("config.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: has no {name}; export the model again")
    if (folder / INDEX).is_file():
        try:
            places = dict(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"])
        except (OSError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"{folder / INDEX}: damaged ({first_line(error)}); export the model again") from error
    else:
        places = {}
    for file in sorted(set(places.values())) or [WEIGHTS]:
        try:
            with safe_open(folder / file, framework="numpy") as weights:
                found = set(weights.keys())
        except (OSError, SafetensorError) as error:
            problem = f"{folder / file}: missing, damaged or truncated ({first_line(error)})"
            raise UserError(f"{problem}; export the model again") from error
        if places and found != {name for name, place in places.items() if place == file}:
            raise UserError(f"{folder / file}: has other tensors than {INDEX} says; export the model again")


def push(upload: Upload, say: Callable[[str], None]) -> str:
    """Upload it as one revision of the repository, which is created if necessary; return its address.

    Weights of an earlier revision that this one does not have are removed from the newest revision; everything else
    stays. Raises `UserError` before anything is uploaded if you are not logged in, or if the repository is public and
    `upload` is private.
    """
    api = HfApi()
    account = _account()
    repo = upload.repo if "/" in upload.repo else f"{account}/{upload.repo}"
    there = _asked(repo, lambda: api.repo_exists(repo))
    if there:
        is_private = bool(_asked(repo, lambda: api.model_info(repo)).private)
        if upload.private and not is_private:
            raise UserError(f"{repo}: exists and is public; add --public to upload there, or choose another name")
        if is_private and not upload.private:
            say(f"{repo} exists and stays private; its settings on the hub can change that")
    else:
        _asked(repo, lambda: api.create_repo(repo, private=upload.private))
    say(f"Uploading {len(upload.files)} files to {repo} as {account}, as a {'new' if there else 'first'} revision")
    commit = _asked(
        repo,
        lambda: api.upload_folder(
            repo_id=repo,
            folder_path=upload.folder,
            commit_message=f"Upload {upload.folder.resolve().name}",
            delete_patterns=OLD_WEIGHTS,
        ),
    )
    return str(commit.commit_url)


def _account() -> str:
    """Return who is logged in. Raises `UserError`."""
    if hub.is_offline():
        raise UserError("HF_HUB_OFFLINE: disables access to the hub; unset it, or use --dry_run")
    answer = hub.who_am_i(ANSWER_S)
    if answer.problem is not None:
        raise UserError(f"{answer.endpoint}: cannot be asked who is logged in ({answer.problem}); check the network")
    if answer.account is None:
        state = "the token is not valid" if answer.has_token else "you are not logged in"
        raise UserError(f"{answer.endpoint}: {state}; run `hf auth login`, with a token that may write")
    return answer.account


def _asked(repo: str, question: Callable[[], Answer]) -> Answer:
    """Return the hub's answer; what goes wrong becomes a `UserError`."""
    try:
        return question()
    except errors.HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            raise UserError(
                f"{repo}: the hub refuses it; use a token that may write (`hf auth login`), and an owner you belong to"
            ) from error
        raise UserError(f"{repo}: {hub.explain(error, 'model')}") from error
    except (errors.HTTPError, OSError, ValueError) as error:
        raise UserError(f"{repo}: the upload failed ({first_line(error)}); the same command resumes it") from error
