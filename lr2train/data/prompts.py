"""The prompts that ``lr2train generate`` continues: one text, or several.

Choice: several prompts come as JSON lines, because a prompt holds line breaks and a line can carry what the user knows
about it. Cost: a file of plain lines has to be converted.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lr2train.config import GenerateConfig, UserError

_KEYS = ("prompt", "prompt_file", "prompts", "prompts_file")
RESULTS = ("text", "finish_reason", "prompt_tokens", "new_tokens", "window", "switched", "seed")
"""The keys that a text adds to its prompt's line."""


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        text: of the prompt.
        source: which one, for an error: a key of the config, with the line of a file.
        given: the line of a file as it was given; of another prompt the text alone.
    """

    text: str
    source: str
    given: dict[str, Any] = field(default_factory=dict)


def are_several(settings: GenerateConfig) -> bool:
    """Whether the prompts are a list or a file of many: the texts are then written as JSON lines."""
    return bool(settings.prompts) or settings.prompts_file is not None


def read(settings: GenerateConfig) -> list[Prompt]:
    """The prompts, at least one.

    Raises:
        UserError: there is none, two keys give prompts, or a file cannot be read or has another form.
    """
    given = [key for key in _KEYS if getattr(settings, key) not in (None, [])]
    if len(given) > 1:
        raise UserError(f"generate.{given[0]} and generate.{given[1]} both give a prompt; leave one of the two out")
    if settings.prompts_file is not None:
        return _lines(Path(settings.prompts_file))
    if settings.prompts:
        return [_prompt(text, f"generate.prompts.{number}") for number, text in enumerate(settings.prompts)]
    if settings.prompt_file is not None:
        return [_prompt(_whole(Path(settings.prompt_file)), "generate.prompt_file")]
    if settings.prompt is not None:
        return [_prompt(settings.prompt, "generate.prompt")]
    return [_prompt(_piped(), "the piped prompt")]


def _prompt(text: str, source: str) -> Prompt:
    return Prompt(text, source, {"prompt": text})


def _piped() -> str:
    if sys.stdin.isatty():
        raise UserError("generate.prompt is empty; set generate.prompt, generate.prompt_file, or pipe a text in")
    if not (text := sys.stdin.read()):
        raise UserError(
            "nothing was piped in as a prompt; set generate.prompt or generate.prompt_file, or pipe a text in"
        )
    return text


def _whole(file: Path) -> str:
    if not (text := _text_of(file, "prompt_file")):
        raise UserError(f"generate.prompt_file={file} is empty; write a prompt into it")
    return text


def _text_of(file: Path, key: str) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        kind = "a file of JSON lines" if key == "prompts_file" else "a text file"
        why = "it is no UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise UserError(f"generate.{key}={file} cannot be read ({why}); set it to {kind}") from error


def _lines(file: Path) -> list[Prompt]:
    """The prompts of a file of JSON lines; blank lines are skipped."""
    found = []
    for number, line in enumerate(_text_of(file, "prompts_file").split("\n"), 1):
        if line.strip():
            source = f"line {number} of generate.prompts_file={file}"
            found.append(_of_line(line, source))
    if not found:
        raise UserError(f"generate.prompts_file={file} has no line; write one JSON object a line")
    return found


def _of_line(line: str, source: str) -> Prompt:
    form = 'make it one JSON object with a text under "prompt"'
    try:
        given = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{source} is not JSON ({error.msg}, column {error.colno}); {form}") from None
    text = given.get("prompt") if isinstance(given, dict) else None
    if not isinstance(text, str):
        raise UserError(f'{source} has no text under "prompt"; {form}')
    if taken := [key for key in RESULTS if key in given]:
        raise UserError(f'{source} has the key "{taken[0]}", which a result has too; give it another name')
    return Prompt(text, source, given)
