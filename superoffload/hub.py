"""Check a name, or the hub itself, with one request, before a library retries for half a minute."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants, errors
from huggingface_hub.utils import build_hf_headers, get_session, validate_repo_id

from superoffload.errors import UserError, first_line


def looks_like_path(name: str) -> bool:
    """Return whether a name can only be a local path: hub ids are `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def has_configs(readme: Path) -> bool:
    """Return whether a data set's README says which files belong to which config and split."""
    return readme.is_file() and "configs" in (huggingface_hub.metadata_load(readme) or {})


def metadata(readme: Path) -> dict[str, Any]:
    """Return the metadata at the head of a card, empty if it has none that can be read."""
    import yaml  # as huggingface_hub does, which lets its errors through

    try:
        return dict(huggingface_hub.metadata_load(readme) or {})
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def check(flag: str, name: str, kind: str, cached: Callable[[], bool]) -> None:
    """Raise `UserError` if the hub does not serve `name`, with the reason and what to do.

    `kind` is `model` or `dataset`. If `cached` returns True, the local cache is enough and the hub is not needed.
    """
    try:
        validate_repo_id(name)
        huggingface_hub.HfApi().auth_check(name, repo_type=kind)
    except errors.HFValidationError as error:
        raise UserError(f"--{flag} {name}: neither a local path nor a name of the form owner/name") from error
    except (errors.HTTPError, OSError) as error:
        if not cached():
            raise UserError(f"--{flag} {name}: {explain(error, kind)}") from error


def explain(error: BaseException, kind: str) -> str:
    """Describe the hub's answer and what to do about it."""
    if isinstance(error, errors.GatedRepoError):
        return f"gated; accept its terms on the {kind}'s page on the hub, then run `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "unknown on the hub, or private; check the spelling, or run `hf auth login`"
    if isinstance(error, errors.HfHubHTTPError):
        return f"the hub answered: {first_line(error)}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "neither a local path nor cached, and HF_HUB_OFFLINE disables access to the hub; unset it"
    return "not a local path, and the hub cannot be reached; check the network, or use a local path"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the hub said: its address, whether a token is stored, the account it belongs to, and what went wrong."""

    endpoint: str
    has_token: bool
    account: str | None
    problem: str | None


def is_offline() -> bool:
    """Return whether HF_HUB_OFFLINE disables access to the hub."""
    return bool(constants.HF_HUB_OFFLINE)


def who_am_i(timeout_s: float) -> Answer:
    """Ask the hub once who is logged in. Never raises for what the network or the hub does."""
    has_token = huggingface_hub.get_token() is not None
    account = problem = None
    try:
        response = get_session().get(
            f"{constants.ENDPOINT}/api/whoami-v2", headers=build_hf_headers(), timeout=timeout_s
        )
        if response.status_code == 200:
            account = str(response.json().get("name"))
        elif response.status_code != 401:  # without a valid token
            problem = f"it answered with status {response.status_code}"
    except (errors.HTTPError, OSError, ValueError) as error:
        problem = first_line(error)
    return Answer(endpoint=constants.ENDPOINT, has_token=has_token, account=account, problem=problem)
