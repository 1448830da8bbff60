"""Take secrets out of what is shown, logged or uploaded: tokens, keys, passwords.

Choice: a value is hidden by its name or by its form, and the name stays. A wrong guess hides a harmless word; a missed
secret cannot be taken back. Cost: a password in free text without a name or a known form is not found.
"""

from __future__ import annotations

import re
from typing import Any

HIDDEN = "(hidden)"
_WORDS = {
    *("key", "keys", "apikey", "token", "secret", "secrets", "password", "passwd", "passphrase", "passcode", "pwd"),
    *("credential", "credentials", "auth", "authorization", "bearer", "cookie"),
}
_SPECIAL_TOKENS = {"bos", "eos", "pad", "unk", "sep", "cls", "mask", "image", "additional", "special"}  # pad_token
_FORMS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[\w-]{16,}|gh[pousr]_\w{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|xox[abprs]-[\w-]{10,}"
    r"|AKIA[0-9A-Z]{16}|AIza[\w-]{30,}|wandb_v\d_\w{16,}|local-[0-9a-f]{40}|ya29\.[\w-]{16,}"
    r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)"
)
# Also a commit of git, which a name tells, and a folder of the hub's cache, which a slash tells.
_WANDB_KEY = re.compile(r"(?<![\w/])[0-9a-f]{40}\b")
_COMMITS = {"revision", "commit", "sha", "sha1"}
_LOGIN = re.compile(r"(?<=://)[^/\s@]+@")  # https://user:password@host
_PAIR = re.compile(r"(?<![\w.])(--?)?([A-Za-z_][\w.-]*)=(\S+)")  # KEY=value inside a text


def names_secret(name: str) -> bool:
    """Whether a key or a variable holds a secret, by its name: HF_TOKEN, data.sources.web.options.api_key."""
    words = re.split(r"[^a-z0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.rpartition(".")[2]).lower())
    return bool(_WORDS.intersection(words)) and not _SPECIAL_TOKENS.intersection(words)


def shown(name: str, value: str) -> str:
    """The text of a named value without its secrets."""
    if value and names_secret(name):
        return HIDDEN
    text = _LOGIN.sub(f"{HIDDEN}@", _FORMS.sub(HIDDEN, value))
    is_commit = _COMMITS.intersection(re.split(r"[^a-z0-9]+", name.lower()))
    text = text if is_commit else _WANDB_KEY.sub(HIDDEN, text)
    return _PAIR.sub(lambda pair: _pair(pair, name), text)


def _pair(pair: re.Match[str], within: str) -> str:
    dashes, name, value = pair.groups(default="")
    return f"{dashes}{name}={HIDDEN if names_secret(name) and name != within else value}"


def without_secrets(value: Any, name: str = "") -> Any:
    """JSON values with ``(hidden)`` in the place of every secret text; numbers stay."""
    if isinstance(value, dict):
        return {key: without_secrets(one, str(key)) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(one, name) for one in value]
    return shown(name, value) if isinstance(value, str) else value
