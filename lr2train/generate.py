"""generate: write text; the rescaled RoPE is used once the text exceeds the original window.

    lr2train generate run=tiny_4k generate.prompt='import os'
    lr2train generate model.path=runs/tiny_4k/export/two generate.prompt_file=book.txt

Up to the original window the original RoPE serves. When the text grows beyond it, the cache is computed anew under the
rescaled RoPE. New text goes to stdout as it comes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lr2train import io, progress, ranks, run
from lr2train.cli.door import main
from lr2train.config import Config, GenerateConfig, UserError
from lr2train.evaluation import trained_run
from lr2train.model import config_json, decode, load, rotary
from lr2train.parallel import processes
from lr2train.rope import hf as rope_hf
from lr2train.rope.factors import Factors
from lr2train.rope.methods import build


def generate(config: Config) -> dict[str, Any]:
    """Run the verb; returns the contents of ``generate.json`` in the run's folder (without ``run=``: in
    ``runs/<name>``).

    Raises:
        UserError: there is no model or no prompt, the text is longer than the target window, or a logit is not finite.
    """
    ranks.refuse_ranks("generate")
    _refuse_bad_settings(config.generate)
    folder = _folder(config)
    config = trained_run.completed(config) if config.run else config
    prompt = _prompt(config)
    factors = factors_of(folder, config)
    tokenizer = load.load_tokenizer(folder)
    tokens = _encoded(prompt, tokenizer)
    _refuse_too_long(len(tokens), config, factors)
    device = processes.pick_device(config.device)
    model = load.load_whole(folder, config.model.dtype, str(device), _overrides(config))
    _refuse_unknown(tokens, model.get_input_embeddings().num_embeddings, folder)
    table = rotary.install(model, factors)
    original, settings = factors.spectrum.window_tokens, config.generate
    how = {"window": settings.window, "temperature": settings.temperature, "top_p": settings.top_p, "seed": config.seed}
    start = time.monotonic()
    new = _show(
        decode.generate(
            model, table, tokens, settings.max_new_tokens, original, stop=load.stop_ids_of(folder, tokenizer), **how
        ),
        tokenizer,
    )
    result = {
        "prompt": prompt,
        "prompt_tokens": len(tokens),
        "new_tokens": len(new),
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "window": table.window,
        "switched": settings.window == "auto" and len(tokens) <= original and table.window == "long",
        "seconds": time.monotonic() - start,
        "provenance": run.provenance(),
    }
    if reason := io.write_json_where_allowed(_run_folder(config) / "generate.json", result):
        progress.say("generate", f"{_run_folder(config) / 'generate.json'} is not written ({reason})")
    switch = " after a switch with re-prefill" if result["switched"] else ""
    progress.say(
        "generate", f"{len(tokens)} + {len(new)} tokens, window {table.window}{switch}, {result['seconds']:.1f} s"
    )
    return result


def _encoded(prompt: str, tokenizer: Any) -> list[int]:
    """Token ids of the prompt, with a single BOS where both the prompt and the tokenizer bring one."""
    tokens = tokenizer(prompt)["input_ids"]
    return tokens[1:] if tokenizer.bos_token_id is not None and tokens[:2] == [tokenizer.bos_token_id] * 2 else tokens


def _show(tokens: Iterator[int], tokenizer: Any) -> list[int]:
    """Print the text as tokens come, in whole characters; returns the tokens."""
    new, shown = [], ""
    for token in tokens:
        new.append(token)
        text = tokenizer.decode(new, skip_special_tokens=True)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # the character is not complete yet
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print()
    return new


def _refuse_bad_settings(settings: GenerateConfig) -> None:
    for key, value, good, limit in (
        ("max_new_tokens", settings.max_new_tokens, settings.max_new_tokens >= 1, "at least 1"),
        ("temperature", settings.temperature, settings.temperature >= 0, "at least 0 (greedy)"),
        ("top_p", settings.top_p, 0 < settings.top_p <= 1, "above 0 and at most 1"),
    ):
        if not good:
            raise UserError(f"generate.{key}={value} is out of its limits; set generate.{key} to {limit}")


def _folder(config: Config) -> Path:
    if config.run is None and config.model.path is None:
        raise UserError(
            "neither run nor model.path is set; set run=<name of a finished run>, or model.path to the folder two/ of "
            "an export"
        )
    if config.run is None:
        folder = load.folder_of(config.model)
        return folder / "two" if (folder / "two" / config_json.NAME).exists() else folder  # the whole export is named
    found = [path for path in (_run_folder(config) / "export" / "two", _run_folder(config) / "model") if path.is_dir()]
    if not found:
        raise UserError(f"run={config.run} has no model in {_run_folder(config)}; set run to a finished training run")
    return found[0]


def _run_folder(config: Config) -> Path:
    return Path(config.runs_folder) / (config.run or config.name)


def _overrides(config: Config) -> dict[str, Any]:
    """``model.overrides`` for a base model; the config of a trained model has them already."""
    return {} if config.run else config.model.overrides


def _prompt(config: Config) -> str:
    if config.generate.prompt_file is not None:
        try:
            return Path(config.generate.prompt_file).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"generate.prompt_file={config.generate.prompt_file} cannot be read ({error}); set it to a text file"
            ) from error
    if config.generate.prompt is None:
        if sys.stdin.isatty():
            raise UserError("generate.prompt is empty; set generate.prompt, generate.prompt_file, or pipe a text in")
        return _not_empty(sys.stdin.read())
    return config.generate.prompt


def _not_empty(piped: str) -> str:
    if not piped:
        raise UserError(
            "nothing was piped in as a prompt; set generate.prompt or generate.prompt_file, or pipe a text in"
        )
    return piped


def factors_of(folder: Path, config: Config) -> Factors:
    """The factors of a model folder.

    The first of these that exists: factors.json of the folder, factors.json of its run, the ``longrope`` dict of its
    config, the ``rope`` group.
    """
    for written in (folder / "factors.json", *([_run_folder(config) / "factors.json"] if config.run else [])):
        if written.exists():
            return Factors.load(written)
    hf_config = load.config_of(load.ModelConfig(path=str(folder), overrides=_overrides(config)))
    return rope_hf.factors_of(load.plain_config(hf_config)) or build(
        config.rope, load.spectrum_of(hf_config, config.model)
    )


def _refuse_unknown(tokens: list[int], n_ids: int, folder: Path) -> None:
    """Raises UserError where the tokenizer has tokens that the model does not know."""
    if max(tokens, default=0) >= n_ids:
        raise UserError(
            f"the tokenizer in {folder} gives the prompt the token id {max(tokens)}, and the model knows {n_ids} "
            "ids; put the model's own "
            "tokenizer into its folder"
        )


def _refuse_too_long(prompt_tokens: int, config: Config, factors: Factors) -> None:
    total = prompt_tokens + config.generate.max_new_tokens
    if total > factors.target_window_tokens:
        raise UserError(
            f"the prompt's {prompt_tokens} tokens and generate.max_new_tokens={config.generate.max_new_tokens} make "
            f"{total}, beyond the "
            f"model's window of {factors.target_window_tokens}; shorten the prompt or lower generate.max_new_tokens"
        )


if __name__ == "__main__":
    main("generate", generate)
