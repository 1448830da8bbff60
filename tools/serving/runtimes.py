"""The runtimes of the serving check, and how each is run: one line of ``RUNTIMES`` and one function a runtime.

Each runtime has a script of its own, which imports this runtime and nothing of lr2train:

    PYTHON tools/serving/with_<runtime>.py request.json answer.json

``cases.request_of`` says what request.json holds. answer.json is ``{"runtime": "vllm 0.32.0", "rows": {name:
{"logprobs": [...], "tokens": [...], "token_logprobs": [...]}}, "refused": {name: reason}}``: log-probabilities of the
last 64 prompt tokens, each given all tokens before it; the greedy new tokens; and theirs. A script leaves a list empty
where its runtime cannot tell.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from lr2train.config import UserError
from lr2train.serving.gguf_longrope import Tables
from tools.serving.cases import Row, Setup, alone, together

EVERY = ("short", "crossing", "at L0", "long")


def transformers(export: Path) -> list[Setup]:
    """``two/`` with its modelling file in every way that generate has; the other folders; ``two/`` as it is alone."""
    ours = {"remote_code": True}
    alike = (*alone("short", "crossing", "long"), together(*EVERY))
    return [
        Setup(export / "two", "trust_remote_code", alike, EVERY, ours),
        Setup(export / "two", "right padding", (together(*EVERY),), EVERY, {**ours, "padding": "right"}),
        Setup(export / "two", "chunked prefill", (together(*EVERY),), EVERY, {**ours, "chunk_tokens": 100}),
        Setup(export / "two", "static cache", alone("crossing"), EVERY, {**ours, "cache": "static"}),
        Setup(export / "long", "", alone("long", "short"), ("long",)),
        Setup(export / "short", "", alone("short"), ("short",), window="original"),
        Setup(export / "two", "no remote code", alone("short", "crossing", "long"), ("long",)),
    ]


def vllm(export: Path) -> list[Setup]:
    """``two/`` with our plugin in every way that vLLM schedules; the other folders; ``two/`` without the plugin."""
    ours = {"plugin": True}
    alike = (*alone("short", "crossing", "long"), together(*EVERY))
    again = tuple((Row(f"{case}, turn {n}", case),) for n, case in enumerate(("crossing", "long", "short", "at L0"), 1))
    cached = {"prompt_logprobs": False, "cached": [batch[0].name for batch in again[1:]]}
    return [
        Setup(export / "two", "plugin", alike, EVERY, ours),
        Setup(export / "two", "plugin, chunks", (together(*EVERY),), EVERY, {**ours, "chunk_tokens": 256}),
        Setup(export / "two", "plugin, prefix cache", again, EVERY, {**ours, **cached}),
        Setup(export / "two", "plugin, compiled", (together(*EVERY),), EVERY, {**ours, "compile": True}),
        Setup(export / "long", "", alone("long", "short"), ("long",)),
        Setup(export / "short", "", alone("short"), ("short",), window="original"),
        Setup(export / "two", "no plugin", alone("short", "crossing", "long")),
    ]


def llama(export: Path) -> list[Setup]:
    """Files in ``gguf/`` of the export, made in fp32 as docs/SERVING.md says; ``converted.gguf`` is ``two/`` converted
    alone.

    Raises:
        UserError: there is none.
    """
    files = export / "gguf"
    if not any(files.glob("*.gguf")):
        raise UserError(f"{files} holds no GGUF; make two.gguf there, by the commands in the card of two/")
    tables = Tables.of(json.loads((export / "two" / "config.json").read_text()))
    corrected = tables.short_scale / tables.long_scale
    both = {"original": {"tokens": tables.original, "attn_factor": corrected}}
    alike = (*alone("short", "crossing", "at L0", "long"), together(*EVERY))
    short = (*alone("short"), together("short", "crossing"))
    return [
        Setup(files / "two.gguf", "two contexts", alike, EVERY, both),
        Setup(files / "two.gguf", "context L", alone("long", "short"), ("long",)),
        Setup(files / "two.gguf", "context L0", short, ("short", "crossing"), {"attn_factor": corrected}, "original"),
        Setup(files / "long.gguf", "", (*alone("long", "short"), together(*EVERY)), ("long",)),
        Setup(files / "short.gguf", "", short, ("short", "crossing"), window="original"),
        Setup(files / "converted.gguf", "no tables added", alone("short", "crossing", "long")),
    ]


RUNTIMES: dict[str, Callable[[Path], list[Setup]]] = {"transformers": transformers, "vllm": vllm, "llama": llama}
