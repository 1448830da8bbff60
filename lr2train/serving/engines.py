"""What each runtime does with each folder of an export: command, what is exact, what is not. For cards and terminal.

Each sentence was checked by running the runtime (transformers 5.23, vLLM 0.32 on CPU, llama-cpp-python 0.3.36), or,
where ``READ`` is said, in the runtime's code alone.

Choice: a runtime is one ``Runtime``: the folders it reads and what is said of them. ``RUNTIMES`` has ours;
``export.runtime=package.module.NAME`` is one of a user's own package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lr2train.config.plugins import is_plugin, plugin
from lr2train.rope import hf as rope_hf
from lr2train.rope.factors import Factors
from lr2train.serving import gguf_longrope

HERE = "."  # a folder in its own model card: a card names no path of the machine that wrote the card
FOLDERS = ("long", "short", "two")
# Model types whose graphs in llama.cpp take RoPE tables. All were run.
GGUF_TYPES = ("llama", "mistral", "mixtral", "phi3", "granite")
_READ = "Read in its code, not run."
_REFUSED_BY_PLUGIN = "the V2 model runner, speculative decoding, pipeline parallelism, KV connectors"


@dataclass(frozen=True)
class Line:
    """One runtime and one folder.

    Attributes:
        runtime: its name.
        folder: "long" | "short" | "two".
        command: with ``{folder}`` in the place of the folder.
        exact: what is computed as in training.
        limits: what is not, or what to mind.
    """

    runtime: str
    folder: str
    command: str
    exact: str
    limits: str = ""


@dataclass(frozen=True)
class Windows:
    """The two windows of a model.

    Attributes:
        factors: of the long window.
        short_factor: attention factor of the short window.
        plain_short: the short window has plain RoPE, and no table of its own.
        config: the model's config.json.
    """

    factors: Factors
    short_factor: float = 1.0
    plain_short: bool = True
    config: dict[str, Any] = field(default_factory=lambda: {"model_type": "llama"})

    @property
    def by_layer_type(self) -> bool:
        """Whether each layer type has a RoPE of its own, and the global layers' one was extended."""
        return rope_hf.by_layer_type(self.config)


@dataclass(frozen=True)
class Runtime:
    """What an export holds for one runtime.

    Attributes:
        folders: that the runtime reads: some of ``FOLDERS``.
        lines: windows of the model -> what is said of each folder.
        files: (folder, windows of the model) -> file name -> text, for files that only this runtime reads.
    """

    folders: tuple[str, ...]
    lines: Callable[[Windows], Sequence[Line]]
    files: Callable[[str, Windows], Mapping[str, str]] = lambda folder, windows: {}


def runtime_of(name: str) -> Runtime:
    """The runtime of ``export.runtime``; ``all`` reads every folder.

    Raises:
        UserError: the name is a plug-in that cannot be imported or is no Runtime.
    """
    if name == "all":
        return Runtime(FOLDERS, lambda windows: ())
    return plugin(name, "export.runtime", Runtime, "Runtime") if is_plugin(name) else RUNTIMES[name]


def lines_of(windows: Windows, folders: Sequence[str], asked: str = "all") -> list[Line]:
    """The lines of all runtimes for the folders that an export holds.

    Args:
        asked: ``export.runtime``; the lines of a plug-in stand first.
    """
    original, target = windows.factors.spectrum.window_tokens, windows.factors.target_window_tokens
    ours = [line for runtime in RUNTIMES.values() for line in runtime.lines(windows)]
    if windows.by_layer_type:  # other runtimes were not checked with these dicts
        ours = [line for line in ours if line.runtime == "transformers"]
    every = [*(runtime_of(asked).lines(windows) if is_plugin(asked) else ()), *ours]
    if target <= original:
        every = [_one_window(line) for line in every if line.folder == "short"]
    return [line for line in every if line.folder in folders]


def _one_window(line: Line) -> Line:
    return Line(line.runtime, line.folder, line.command, line.exact)


def _transformers(windows: Windows) -> list[Line]:
    load, original = "AutoModelForCausalLM.from_pretrained('{folder}'", windows.factors.spectrum.window_tokens
    factor, short_factor = windows.factors.attention_factor, windows.short_factor
    below = (
        f"Texts of up to {original} tokens are exact too{_but_for_bits(windows)}."
        if factor == short_factor
        else f"Texts of up to {original} tokens get the attention factor {factor:g} in the place of "
        f"{short_factor:g}, and are inexact."
    )
    return [
        Line(
            "transformers", "two", f"{load}, trust_remote_code=True)",
            "every length, across the switch in generate; each text of a padded batch; chunked prefill, static cache",
            "Refused: a cache that a caller carries across the switch, speculative decoding, continuous batching.",
        ),
        Line(
            "transformers", "two", f"{load})", f"batches of one length, above {original} tokens",
            f"{below} Only the Phi-3 family computes its cache anew when a text grows beyond {original} tokens. One "
            "long text puts all texts of its batch under the rescaled table.",
        ),
        Line(
            "transformers", "long", f"{load})", f"texts of more than {original} tokens",
            "Shorter texts are under the rescaled table too.",
        ),
        Line("transformers", "short", f"{load})", f"texts of up to {original} tokens"),
    ]  # fmt: skip


def _but_for_bits(windows: Windows) -> str:
    """Of a base that was extended already, the short factors give the frequencies but for their last bits."""
    return ", but for the last bits of the base's own frequencies" if rope_hf.is_rescaled(windows.config) else ""


def _vllm(windows: Windows) -> list[Line]:
    return [
        Line(
            "vLLM", "two", f"vllm serve {{folder}} --max-model-len {windows.factors.target_window_tokens}",
            "every length, across the switch; texts of both windows at once; chunked prefill, prefix cache",
            "With the plugin of lr2train in vLLM's environment (pip install ./serving/lr2train_vllm); without it, the "
            f"rescaled table serves all texts. Run on CPU. Refused: {_REFUSED_BY_PLUGIN}.",
        ),
        *_server(windows, "vLLM", "vllm serve {folder}", "--max-model-len", "two/ needs the plugin."),
    ]  # fmt: skip


def _sglang(windows: Windows) -> list[Line]:
    command = "python -m sglang.launch_server --model-path {folder}"
    more = f"Do not serve two/: one table would serve all. {_READ}"
    return _server(windows, "SGLang", command, "--context-length", more)


def _tensorrt_llm(windows: Windows) -> list[Line]:
    original, target = windows.factors.spectrum.window_tokens, windows.factors.target_window_tokens
    return [
        Line(
            "TensorRT-LLM", "long", "trtllm-serve {folder}", f"texts of {original + 1} to {target} tokens",
            f"Shorter texts are under the rescaled table too. {_READ}",
        ),
        Line("TensorRT-LLM", "short", "trtllm-serve {folder}", f"texts of up to {original} tokens", _READ),
    ]  # fmt: skip


def _server(windows: Windows, runtime: str, command: str, limit: str, more: str) -> list[Line]:
    """Lines of a server; ``limit`` is its flag for the longest text."""
    original, target = windows.factors.spectrum.window_tokens, windows.factors.target_window_tokens
    # Servers multiply the config's window by the factor of a linear or dynamic RoPE, and would serve beyond L0.
    short = f"{command} {limit} {original}" if rope_hf.is_rescaled(windows.config) else command
    hand_over = "When a text reaches this length, send prompt and text to a server of long/."
    return [
        Line(
            runtime, "long", command, f"texts of {original + 1} to {target} tokens",
            f"Shorter texts are under the rescaled table too. {more}",
        ),
        Line(runtime, "short", short, f"texts of up to {original} tokens", f"{hand_over} {more}"),
    ]  # fmt: skip


def why_no_gguf(config: Mapping[str, Any], window_tokens: int, extended: bool = True) -> str:
    """Why llama.cpp cannot compute texts of a window; empty: it can.

    Args:
        config: the model's config.json.
        window_tokens: length of the longest text.
        extended: the window needs RoPE tables.
    """
    model_type, sliding = config["model_type"], config.get("sliding_window")
    if extended and model_type not in GGUF_TYPES:
        return f"llama.cpp takes no RoPE tables for {model_type}"
    if model_type in GGUF_TYPES and sliding and sliding < window_tokens:
        return f"llama.cpp has no sliding window for {model_type}"
    return ""


def _llama_cpp(windows: Windows) -> list[Line]:
    """Of short/ with a table of its own, the converter would write another attention factor: two/ has it right."""
    original, target = windows.factors.spectrum.window_tokens, windows.factors.target_window_tokens
    convert = "python convert_hf_to_gguf.py {folder} --outfile converted.gguf"
    why = why_no_gguf(windows.config, target)
    lines = []
    if windows.plain_short and not why_no_gguf(windows.config, original, extended=False):
        warning = f"{why}: do not convert long/ or two/." if why else ""
        lines = [Line("llama.cpp", "short", convert, f"texts of up to {original} tokens", warning)]
    return lines if why else [*_with_tables(windows, original, target, convert), *lines]


def _with_tables(windows: Windows, original: int, target: int, convert: str) -> list[Line]:
    """Of files that ``gguf_longrope.py`` has treated."""
    serve = "llama-server -m model.gguf"
    add = f"{convert} && python {{folder}}/{gguf_longrope.NAME} converted.gguf model.gguf && {serve} -c {target}"
    flags = gguf_longrope.short_flags(original, windows.short_factor / windows.factors.attention_factor)
    context = gguf_longrope.short_context(original)
    warning = "The second command adds the tables; without it, plain RoPE is computed at every length."
    below = "Shorter texts are under the rescaled table too."
    long_texts = f"texts of {original + 1} to {target} tokens"
    lines = [
        Line("llama.cpp", "two", add, long_texts, f"{warning} {below}"),
        Line(
            "llama.cpp", "two", f"{serve} {flags}", f"texts of up to {context} tokens",
            "The same file. To go on after this length, send prompt and text to the server of the long context.",
        ),
        Line(
            "llama.cpp", "long", add, long_texts,
            f"{warning} One table in every context, for programs that choose the context themselves. {below}",
        ),
    ]  # fmt: skip
    return lines if context else [lines[0], lines[2]]  # llama.cpp has no context of fewer than 256 tokens


RUNTIMES = {
    "transformers": Runtime(("two",), _transformers),
    "vllm": Runtime(FOLDERS, _vllm),
    "sglang": Runtime(("long", "short"), _sglang),
    "gguf": Runtime(("long", "two"), _llama_cpp),
    "tensorrt_llm": Runtime(("long", "short"), _tensorrt_llm),
}


def in_words(line: Line, folder: str | Path) -> str:
    """One line for the terminal."""
    limits = f" {line.limits}" if line.limits else ""
    return f"{line.runtime}, {line.folder}/: {line.command.format(folder=folder)}: exact for {line.exact}.{limits}"


_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [long-context, longrope2, lr2train]
---
# {name}

{base} extended from {original} to {target} tokens with LongRoPE2 (mixed context window training, lr2train).

{about}{layers}

| runtime | command | exact for | limits |
|---|---|---|---|
{rows}

The model was trained with its original RoPE up to {original} tokens (attention factor {short_factor:g}) and with
searched factors ({method}, attention factor {factor:g}) beyond. The text's total length, prompt and generated tokens
together, decides. When a text grows beyond {original} tokens, its cache has to be computed anew.
"""
_ABOUT = {
    "long": "This folder is for texts of more than {original} tokens. It has one RoPE table for every length, and the "
    "attention factor is part of the weights of q and k, so that no runtime has to choose or know anything.",
    "short": "This folder is for texts of up to {original} tokens. It has the trained weights and the model's original "
    "RoPE.",
    "two": "This folder has both RoPE tables (`longrope`). `modeling_longrope2.py` chooses the table of each text; "
    "`lr2train generate model.path=<this folder>` and lr2train's vLLM plugin do so too.",
}
_LAYERS = (
    " Each layer type has a RoPE of its own. The layers with full attention have the tables above, and the layers with "
    "a sliding window keep theirs. The config holds both in `rope_parameters`, by layer type, as transformers 5 reads "
    "it. Other runtimes were not checked with this model."
)
_ONE_WINDOW_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [lr2train]
---
# {name}

{base} trained with lr2train at its original window of {original} tokens.

| runtime | command | exact for | limits |
|---|---|---|---|
{rows}
"""


def _name_of(base: str | None) -> str:
    """The last part of the base's path; of the model of a run, the run's name."""
    path = Path(base or "A model trained from scratch")
    return path.parent.name if path.name == "model" and path.parent.name else path.name


def card(folder: str, name: str, base: str | None, windows: Windows, asked: str = "all") -> str:
    """The model card of a folder; ``asked`` as in ``lines_of``."""
    lines, factors = lines_of(windows, (folder,), asked), windows.factors
    rows = [
        f"| {line.runtime} | `{line.command.format(folder=HERE)}` | {line.exact} | {line.limits} |" for line in lines
    ]
    original, target = factors.spectrum.window_tokens, factors.target_window_tokens
    return (_CARD if target > original else _ONE_WINDOW_CARD).format(
        name=name,
        base=_name_of(base),
        original=original,
        target=target,
        about=_ABOUT[folder].format(original=original),
        layers=_LAYERS if windows.by_layer_type else "",
        rows="\n".join(rows),
        short_factor=windows.short_factor,
        method=factors.method,
        factor=factors.attention_factor,
    )
