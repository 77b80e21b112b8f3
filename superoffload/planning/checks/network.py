"""The hub and Weights & Biases: reachable, logged in, or switched off."""

import netrc
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from superoffload.planning.checks.finding import Finding, Surroundings, public

if TYPE_CHECKING:
    from superoffload.hub import Answer

TIMEOUT_S = 5.0


def hub(around: Surroundings) -> Iterator[Finding]:
    """Check whether the hub answers, and who is logged in; asks nothing in offline mode."""
    from superoffload.hub import is_offline, who_am_i  # here, so that a missing package is a finding of `versions`

    yield hub_finding(None if is_offline() else who_am_i(TIMEOUT_S))


def hub_finding(answer: "Answer | None") -> Finding:
    """Judge the hub's answer; None in offline mode."""
    name = "hub"
    endpoint = public(answer.endpoint) if answer else ""
    if answer is None:
        return Finding(
            name=name,
            looked_at="HF_HUB_OFFLINE",
            found="offline: only local paths and what is cached",
            verdict="skipped",
        )
    if answer.problem:
        return Finding(
            name=name,
            looked_at=endpoint,
            found=f"cannot be reached, and names of models and data sets wait for it: {public(answer.problem)}",
            verdict="slow",
            fix="Local paths work all the same. Behind a proxy, set HTTPS_PROXY. To use only what is cached:\n"
            "$ export HF_HUB_OFFLINE=1",
        )
    if answer.has_token and answer.account is None:
        return Finding(
            name=name,
            looked_at=endpoint,
            found="reachable, but it refuses the token, for public models too",
            verdict="broken",
            fix="$ hf auth login",
        )
    return Finding(
        name=name,
        looked_at=endpoint,
        found=f"reachable, logged in as {answer.account}" if answer.account else "reachable, not logged in",
        verdict="good",
        fix="" if answer.account else "Only gated and private models need it:\n$ hf auth login",
    )


def wandb(around: Surroundings) -> Iterator[Finding]:
    """Check whether W&B has a key, or is switched off."""
    yield wandb_finding(around.environment, _logins(around.environment))


def wandb_finding(environment: Mapping[str, str], logins: Mapping[str, str]) -> Finding:
    """Judge W&B; `logins` are the users of ~/.netrc by host. The key itself is never shown."""
    mode = environment.get("WANDB_MODE", "")
    host = urlsplit(environment.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    looked_at = "WANDB_MODE, WANDB_API_KEY, ~/.netrc"
    if mode in ("offline", "disabled", "dryrun"):
        return Finding(name="W&B", looked_at=looked_at, found=f"WANDB_MODE is {mode}", verdict="good")
    if environment.get("WANDB_API_KEY") or host in logins:
        return Finding(name="W&B", looked_at=looked_at, found=f"a key for {host}", verdict="good")
    return Finding(
        name="W&B",
        looked_at=looked_at,
        found="no key, which is needed only with --use_wandb",
        verdict="good",
        fix="Log in, or keep the numbers on this machine with WANDB_MODE=offline:\n$ wandb login",
    )


def _logins(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the users of the netrc file by host; empty if there is no such file, or it cannot be read."""
    path = Path(environment.get("NETRC") or os.path.expanduser("~/.netrc"))
    try:
        return {host: entry[0] for host, entry in netrc.netrc(path).hosts.items()}
    except (OSError, netrc.NetrcParseError):
        return {}
