"""Asks the hub once whether a name can be had, before a library retries for half a minute."""

from collections.abc import Callable

import huggingface_hub
from huggingface_hub import errors
from huggingface_hub.utils import validate_repo_id

from superoffload.errors import UserError


def check(flag: str, name: str, kind: str, cached: Callable[[], bool]) -> None:
    """Raise `UserError` where the hub does not hand out `name`, with the way out.

    `kind` is `model` or `dataset`. What `cached` finds on this machine can be used without the hub.
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
    """Say what the hub's answer means and what to do."""
    if isinstance(error, errors.GatedRepoError):
        return f"gated; accept its terms on the {kind}'s page on the hub, then run `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "unknown on the hub, or private; check the spelling, or run `hf auth login`"
    if isinstance(error, errors.HfHubHTTPError):
        return f"the hub answered: {str(error).splitlines()[0]}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "neither a local path nor in the cache, and HF_HUB_OFFLINE keeps the hub from being asked; unset it"
    return "not a local path, and the hub cannot be reached; check the network, or give a local path"
