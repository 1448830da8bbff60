"""Secrets are taken out of what is shown; everything else stays as it is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lr2train.config import Config, to_dict
from lr2train.config.hidden import HIDDEN, names_secret, shown, without_secrets

HF, WANDB, GITHUB = "hf_" + "aB3" * 11, "0123456789abcdef" * 2 + "01234567", "ghp_" + "x1" * 18


@pytest.mark.parametrize(
    "name",
    ["HF_TOKEN", "WANDB_API_KEY", "data.sources.web.options.api_key", "options.hubToken", "AWS_SECRET_ACCESS_KEY",
     "pwd", "HUGGING_FACE_HUB_TOKEN", "options.authorization", "db-password"],
)  # fmt: skip
def test_a_secret_by_its_name(name):
    assert shown(name, "swordfish") == HIDDEN


@pytest.mark.parametrize(
    "name",
    ["data.tokenizer", "segment_tokens", "TOKENIZERS_PARALLELISM", "pad_token", "bos_token_id", "keep_below", "monkey",
     "optim.lr", "NCCL_SOCKET_IFNAME", "author"],
)  # fmt: skip
def test_a_name_that_only_looks_alike_hides_nothing(name):
    assert shown(name, "swordfish") == "swordfish"


@pytest.mark.parametrize("secret", [HF, WANDB, GITHUB, "AKIA" + "Z9" * 8, "sk-proj-" + "a1B" * 9])
@pytest.mark.parametrize("around", ["{}", "--key {}", "https://x.org/?a={}", "[1, '{}']"])
def test_a_secret_by_its_form(secret, around):
    assert secret not in shown("model.path", around.format(secret))


def test_a_login_in_an_address_is_hidden_and_the_address_stays():
    assert shown("HF_ENDPOINT", "https://me:swordfish@hub.org/x") == f"https://{HIDDEN}@hub.org/x"


def test_a_secret_among_arguments_is_hidden_and_the_others_stay():
    argument = "data.sources.web.options.token=swordfish"
    assert shown("command", argument) == f"data.sources.web.options.token={HIDDEN}"
    assert shown("command", "optim.lr=1e-5") == "optim.lr=1e-5"


def test_a_commit_is_no_key():
    assert shown("model.revision", WANDB) == WANDB
    assert shown("model.path", f"/hub/snapshots/{WANDB}/x") == f"/hub/snapshots/{WANDB}/x"


def test_the_default_config_has_no_secret():
    config = to_dict(Config(name="x"))
    assert without_secrets(config) == config


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text("ab =.", max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["lr", "token", "a"]), inner, max_size=3)
    ),
)


def _texts_named_token(value, name=""):
    if isinstance(value, dict):
        return [one for key, inner in value.items() for one in _texts_named_token(inner, key)]
    if isinstance(value, list):
        return [one for inner in value for one in _texts_named_token(inner, name)]
    return [value] if names_secret(name) and isinstance(value, str) and value else []


@given(_JSON)
def test_hiding_reaches_every_depth_and_twice_is_once(value):
    once = without_secrets(value)
    assert set(_texts_named_token(once)) <= {HIDDEN}
    assert without_secrets(once) == once
    if not _texts_named_token(value):
        assert once == value
