"""generate: write text; the rescaled RoPE is used once the text exceeds the original window.

    lr2train generate run=tiny_4k generate.prompt='import os'
    lr2train generate model.path=runs/tiny_4k/export/two generate.prompt_file=book.txt
    lr2train generate run=tiny_4k generate.prompts_file=many.jsonl > texts.jsonl

Up to the original window the original RoPE serves. When the text grows beyond it, the cache is computed anew under the
rescaled RoPE. The text of one prompt goes to stdout as it comes. Several prompts are decoded together, and stdout gets
one JSON object a prompt, in their order.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import jinja2
import torch

from lr2train import io, progress, ranks, run
from lr2train.cli.door import main
from lr2train.config import Config, RopeConfig, UserError
from lr2train.data import prompts
from lr2train.evaluation import trained_run
from lr2train.model import config_json, decode, load, rotary
from lr2train.model.text import Text, special_stops
from lr2train.parallel import processes
from lr2train.rope import hf as rope_hf
from lr2train.rope.factors import Factors
from lr2train.rope.methods import METHODS, build

Decoding = Callable[[list[decode.Row]], Iterator[int]]
"""``decode.decode`` with everything but the rows."""


def generate(config: Config) -> dict[str, Any]:
    """Run the verb.

    Returns:
        The contents of ``generate.json`` in the run's folder (without ``run=``: in ``runs/<name>``); of several
        prompts ``{"texts": […]}``, the lines of ``generate.jsonl``.

    Raises:
        UserError: there is no model or no prompt, a text is longer than the target window, a batch does not fit into
            the device's memory, or a logit is not finite.
        Interrupted: Ctrl-C; what was generated is written.
    """
    ranks.refuse_ranks("generate")
    settings = config.generate
    _check_stop_strings(settings.stop)
    asked = prompts.read(settings)
    folder = _folder(config)
    if config.run:
        config = trained_run.completed(config, with_model=folder.name == "model")
    factors = factors_of(folder, config)
    tokenizer = load.load_tokenizer(folder)
    rows = _rows(asked, tokenizer, folder, config, factors)
    device = processes.pick_device(config.device)
    model = load.load_whole(folder, config.model.dtype, str(device), _overrides(config))
    _refuse_unknown(asked, rows, model.get_input_embeddings().num_embeddings, folder)
    decoding = partial(
        decode.decode, model, rotary.install(model, factors), temperature=settings.temperature, top_p=settings.top_p
    )
    texts = [Text(tokenizer, settings.stop) for _ in rows]
    if prompts.are_several(settings):
        results = [_Result(*one) for one in zip(asked, rows, texts, strict=True)]
        file = _run_folder(config) / "generate.jsonl"
        return _several(results, decoding, settings.batch_tokens, model.dtype, file)
    return _one(_Result(asked[0], rows[0], texts[0]), decoding, model.dtype, _run_folder(config) / "generate.json")


@dataclass(frozen=True)
class _Result:
    """A prompt, its row, and its text."""

    prompt: prompts.Prompt
    row: decode.Row
    text: Text

    def take(self) -> None:
        """Read the row's new tokens; a stop string ends the row."""
        self.text.take(self.row.tokens)
        if self.text.stopped:
            self.row.finish = "stop"

    def values(self) -> dict[str, Any]:
        """The line of the prompt with what was generated."""
        row = self.row
        found = (
            self.text.whole(row.tokens),
            "stop" if row.finish == "end" else row.finish,
            len(row.prompt),
            len(row.tokens),
            row.table,
            row.table == "long" and row.window(len(row.prompt)) == "short",
            row.seed,
        )
        return {**self.prompt.given, **dict(zip(prompts.RESULTS, found, strict=True))}


def _one(result: _Result, decoding: Decoding, dtype: torch.dtype, file: Path) -> dict[str, Any]:
    """Print the text as it comes, and write ``generate.json``."""
    row, start = result.row, time.monotonic()
    try:
        shown = 0
        with _memory_named(_for_one_text(dtype)):
            for _ in decoding([row]):
                decode.refuse_not_finite(row, dtype)
                result.take()
                certain = result.text.certain
                print(certain[shown:], end="", flush=True)
                shown = max(shown, len(certain))
        print(result.text.whole(row.tokens)[shown:])
    except KeyboardInterrupt:
        row.finish = "interrupted"
        print(flush=True)
    values = {**result.values(), "seconds": time.monotonic() - start, "provenance": run.provenance()}
    if reason := io.write_json_where_allowed(file, values):
        progress.say("generate", f"{file} is not written ({reason})")
    switch = " after a switch with re-prefill" if values["switched"] else ""
    progress.say(
        "generate",
        f"{values['prompt_tokens']} + {values['new_tokens']} tokens, window {row.table}{switch}, "
        f"{values['seconds']:.1f} s" + (f"; interrupted, {file} has the text so far" * (row.finish == "interrupted")),
    )
    if row.finish == "interrupted":
        raise run.Interrupted
    return values


def _several(
    results: list[_Result], decoding: Decoding, batch_tokens: int, dtype: torch.dtype, file: Path
) -> dict[str, Any]:
    """Decode in batches, in the order of the prompts; the lines go to stdout and to ``generate.jsonl``."""
    lines: list[dict[str, Any]] = []
    going = True
    with _written_where_allowed(file) as out, progress.meter("generate") as tick:
        for batch in _batches(results, batch_tokens):
            fewer = f"set generate.batch_tokens below {batch_tokens}"
            remedy = fewer if len(batch) > 1 else _for_one_text(dtype)
            with _memory_named(remedy):
                going = _decode(batch, decoding, partial(_tell, tick, len(lines), len(results)))
            for one in batch:
                lines.append(one.values())
                line = json.dumps(lines[-1], ensure_ascii=False)
                print(line, flush=True)
                print(line, file=out, flush=True)
            if not going:
                break
    where = f"{len(lines)} of {len(results)} texts are in {file}"
    if not going:
        progress.say("generate", f"interrupted; {where}, the last of them unfinished")
        raise run.Interrupted
    if failed := [one.prompt.source for one in results if one.row.finish == "not finite"]:
        remedy = "" if dtype == torch.float32 else "; set model.dtype=float32"
        raise UserError(
            f"{len(failed)} of {len(results)} texts end early, because logits are not finite ({failed[0]} first); "
            f"{where}{remedy}"
        )
    progress.say("generate", where)
    return {"texts": lines}


def _decode(batch: list[_Result], decoding: Decoding, tell: Callable[[float], None]) -> bool:
    """Decode one batch; False after Ctrl-C.

    Args:
        tell: takes the number of texts that are done; a text that goes on counts for its share of ``max_new_tokens``.
    """
    rows = [one.row for one in batch]
    shares = [0.0] * len(rows)
    done = 0.0
    try:
        for number in decoding(rows):
            if batch[number].text.stops:
                batch[number].take()
            row, before = rows[number], shares[number]
            shares[number] = 1.0 if row.finish else len(row.tokens) / row.max_new_tokens
            done += shares[number] - before
            tell(done)
    except KeyboardInterrupt:
        for row in rows:
            row.finish = row.finish or "interrupted"
        return False
    return True


def _for_one_text(dtype: torch.dtype) -> str:
    return "set model.dtype=bfloat16" if dtype == torch.float32 else "shorten the prompt"


@contextlib.contextmanager
def _memory_named(remedy: str) -> Iterator[None]:
    """Raises UserError with the remedy where the device has not enough memory for the keys and values of a batch."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        said = str(error).split(". ")[0]  # the rest is torch's advice
        raise UserError(f"the texts of a batch do not fit into the device's memory ({said}); {remedy}") from error


def _tell(tick: progress.Tick, before: int, total: int, done: float) -> None:
    tick(min(before + done, float(total)), float(total), f"{total} texts")  # a sum of shares is rounded


def _batches(results: list[_Result], batch_tokens: int) -> Iterator[list[_Result]]:
    """Neighbours whose number times the longest has at most ``batch_tokens`` tokens."""
    batch: list[_Result] = []
    for one in results:
        longest = max(len(other.row.prompt) + other.row.max_new_tokens for other in (*batch, one))
        if batch and (len(batch) + 1) * longest > batch_tokens:
            yield batch
            batch = []
        batch.append(one)
    yield batch


@contextlib.contextmanager
def _written_where_allowed(file: Path) -> Iterator[IO[str]]:
    """A text file for writing; the null device, with a message, where its folder is read-only."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        out = file.open("w", encoding="utf-8")
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        progress.say("generate", f"{file} is not written ({error.strerror})")
        out = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 (closed below)
    with out:
        yield out


def _rows(
    asked: list[prompts.Prompt], tokenizer: Any, folder: Path, config: Config, factors: Factors
) -> list[decode.Row]:
    """A row for each prompt; prompt number i samples with seed ``seed + i``."""
    settings = config.generate
    window = partial(decode.window_of, original_window_tokens=factors.spectrum.window_tokens, window=settings.window)
    stop_ids = load.stop_ids_of(folder, tokenizer) | special_stops(tokenizer, settings.stop)
    rows = []
    for number, one in enumerate(asked):
        tokens = _encoded(one, tokenizer, folder, settings.chat)
        if not tokens:
            raise UserError(f"{one.source} is empty; write some text there")
        _refuse_too_long(one, len(tokens), config, factors)
        rows.append(decode.Row(tokens, settings.max_new_tokens, window, stop_ids, config.seed + number))
    return rows


def _encoded(prompt: prompts.Prompt, tokenizer: Any, folder: Path, chat: bool) -> list[int]:
    """Token ids of the prompt, with a single BOS where both the prompt and the tokenizer bring one.

    Raises:
        UserError: the tokenizer has no chat template, or its template fails.
    """
    if not chat:
        tokens = tokenizer(prompt.text, verbose=False)["input_ids"]  # our own error tells a text that is too long
        bos = tokenizer.bos_token_id
        return tokens[1:] if bos is not None and tokens[:2] == [bos] * 2 else tokens
    if not tokenizer.chat_template:
        raise UserError(
            f"generate.chat=true, and the tokenizer in {folder} has no chat template; set generate.chat=false"
        )
    message = [{"role": "user", "content": prompt.text}]
    try:
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    except jinja2.TemplateError as error:
        raise UserError(
            f"the chat template in {folder} fails for a user's message ({error}); set generate.chat=false"
        ) from error
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _check_stop_strings(stops: list[str]) -> None:
    """Refuse an empty stop string; tell where one has a backslash for what the user may mean as a line break."""
    for number, stop in enumerate(stops):
        if not stop:
            raise UserError(f"generate.stop.{number} is empty and would end every text; leave it out")
        if "\\n" in stop:
            progress.say(
                "generate", f"the stop string {stop} has a backslash and an n; a line break is typed $'\\n' in bash"
            )


def _folder(config: Config) -> Path:
    if config.run is None and config.model.path is None:
        raise UserError(
            "neither run nor model.path is set; set run=<name of a finished run>, or model.path to the folder two/ of "
            "an export"
        )
    if config.run is None:
        folder = load.folder_of(config.model)
        return folder / "two" if (folder / "two" / config_json.NAME).exists() else folder  # the whole export is named
    # model/ first: an export may be older than the model, from a checkpoint.
    found = [path for path in (_run_folder(config) / "model", _run_folder(config) / "export" / "two") if path.is_dir()]
    if not found:
        exports = f"write one with `lr2train export run={config.run} export.checkpoint=last`"
        unfinished = any((_run_folder(config) / "checkpoints").glob("step_*"))
        raise UserError(
            f"run={config.run} has no model in {_run_folder(config)}; "
            f"{exports if unfinished else 'set run to a finished training run'}"
        )
    return found[0]


def _run_folder(config: Config) -> Path:
    return Path(config.runs_folder) / (config.run or config.name)


def _overrides(config: Config) -> dict[str, Any]:
    """``model.overrides`` for a base model; the config of a trained model has them already."""
    return {} if config.run else config.model.overrides


def factors_of(folder: Path, config: Config) -> Factors:
    """The factors of a model folder.

    The first of these that exists: factors.json of the folder, factors.json of its run, the ``longrope`` dict of its
    config, the ``rope`` group; if this names no factors either, the model's own RoPE, in its own window.
    """
    for written in (folder / "factors.json", *([_run_folder(config) / "factors.json"] if config.run else [])):
        if written.exists():
            return Factors.load(written)
    hf_config = load.config_of(load.ModelConfig(path=str(folder), overrides=_overrides(config)))
    if carried := rope_hf.factors_of(load.plain_config(hf_config)):
        return carried
    spectrum, rope = load.spectrum_of(hf_config, config.model), config.rope
    if rope.factors is None and rope.method == RopeConfig.method and rope.critical_index is None and not rope.tail:
        return METHODS["none"](spectrum, spectrum.window_tokens)
    return build(rope, spectrum)


def _refuse_unknown(asked: list[prompts.Prompt], rows: list[decode.Row], n_ids: int, folder: Path) -> None:
    """Raises UserError where the tokenizer has tokens that the model does not know."""
    for one, row in zip(asked, rows, strict=True):
        if max(row.prompt) >= n_ids:
            raise UserError(
                f"the tokenizer in {folder} gives {one.source} the token id {max(row.prompt)}, and the model knows "
                f"{n_ids} ids; put the model's own tokenizer into its folder"
            )


def _refuse_too_long(prompt: prompts.Prompt, n_tokens: int, config: Config, factors: Factors) -> None:
    total = n_tokens + config.generate.max_new_tokens
    if total > factors.target_window_tokens:
        raise UserError(
            f"the {n_tokens} tokens of {prompt.source} and generate.max_new_tokens={config.generate.max_new_tokens} "
            f"make {total}, beyond the model's window of {factors.target_window_tokens}; shorten the prompt or lower "
            "generate.max_new_tokens"
        )


if __name__ == "__main__":
    main("generate", generate)
