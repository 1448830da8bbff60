"""Every family through the whole path, on CPU: search, train, evaluate, export, reload in plain transformers, generate.

    python -m tools.families [--ranks 2] [--only mixtral,granite] [--skip search,evaluate]

For each family a tiny model with random weights is published by transformers' own ``save_pretrained``. ``train`` then
makes two steps of two segments from it, packed short ones and long ones, with ZeRO-3. The reference is plain
transformers in fp64 with eager attention, document by document without packing, and torch's AdamW. A row of the table
holds, of a family:

- load: largest difference between the logits of our loaded model and of ``from_pretrained``;
- train: largest relative difference of the two steps' losses (the second follows from the gradients of the first);
- names: whether the run's model and every exported folder hold the tensors, by name and shape, of the published folder;
- long, short, two: largest difference between the logits of the exported folder in transformers and of the run's model
  under our own tables, relative to the largest logit; ``refused`` where the attention factor cannot be folded;
- generate: whether `lr2train generate` and plain transformers (``two/`` with its modelling file) write the same tokens
  across L0.

Exits with 1 where a figure misses its bound, a family of ``serving_families.FAMILIES`` is refused, or an error is no
refusal in one sentence. A family that is refused shows the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # tests import their helpers from there

import tiny
from batches import labels_of
from ranks import run_ranks
from serving_families import FAMILIES, MORE, SIZES
from transformers import AutoConfig, AutoModelForCausalLM

from lr2train.cli.composition import compose
from lr2train.config import ModelConfig, UserError
from lr2train.data.corpus import Corpus
from lr2train.data.feed.loader import make_loader
from lr2train.evaluate import evaluate
from lr2train.export import export
from lr2train.generate import generate
from lr2train.model import load, rotary
from lr2train.model.weight_files import safetensors_of
from lr2train.rope.factors import Factors
from lr2train.search import search
from lr2train.train import train

BOUNDS = {"load": 0.0, "train": 1e-5, "long": 1e-4, "short": 1e-5, "two": 1e-5}
_ROUTER_LOSS = 0.1  # coefficient, large beside those of published models
SEARCH = [
    "search=small", "search.questions=2", "search.distractors=1", "search.final_documents=1", "search.population=1",
    "search.top_k=1", "search.documents=1", "search.generations=1",
]  # fmt: skip
EVALUATE = ["eval=tiny", "eval.lengths_tokens=[64,128]", "eval.depths=[0.5]", "eval.samples=1", "eval.methods=[none]",
            "eval.text_documents=1", "eval.distractors=1"]  # fmt: skip
_PROMPT, _NEW = 56, 16  # tokens: the text grows across L0 = 64


def main() -> int:
    """Run the families; the exit status."""
    asked = _arguments()
    only = [name for name in asked.only.split(",") if name]
    names = [name for name in {**FAMILIES, **MORE} if not only or any(name.split(",")[0] == one for one in only)]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            _corpus(root)
        for number, name in enumerate(names):
            started = time.monotonic()
            row = _row(root / str(number), root, name, asked.ranks, asked.skip.split(","))
            rows.append(row)
            print(f"{name}: {row} ({time.monotonic() - started:.0f} s)", file=sys.stderr, flush=True)
            shutil.rmtree(root / str(number), ignore_errors=True)
    _print(rows)
    return int(any(_misses(row) for row in rows))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1, help="ranks that share each segment while training")
    parser.add_argument("--only", default="", help="families, separated by commas")
    parser.add_argument("--skip", default="", help="search, evaluate or both, separated by a comma")
    return parser.parse_args()


def _row(folder: Path, world: Path, name: str, ranks: int, skip: list[str]) -> dict[str, Any]:
    """The figures of one family; ``refused`` holds a refusal, and ``failed`` any other error."""
    row: dict[str, Any] = {"family": name}
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            _fill(row, folder, world, name, ranks, skip)
    except UserError as error:
        row["refused"] = str(error)
    except Exception as error:
        row["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"
        print(traceback.format_exc(), file=sys.stderr)
    return row


def _fill(row: dict[str, Any], folder: Path, world: Path, name: str, ranks: int, skip: list[str]) -> None:
    base = publish(folder / "base", name)
    row["load"] = _load_difference(base)
    arguments = _arguments_of(folder, world, base, ranks)
    if "search" not in skip:
        search(compose("search", [*arguments, "name=factors", *SEARCH]))
        row["search"] = "yes"
    run_ranks(_train, ranks, [*arguments, "name=run"], tmp_path=folder, timeout_s=300)
    run = folder / "run"
    row["train"] = _loss_difference(arguments, base, run)
    if "evaluate" not in skip:
        evaluate(compose("evaluate", [f"runs_folder={folder}", "run=run", "device=cpu", "threads=1", *EVALUATE]))
        row["evaluate"] = "yes"
    given = [f"runs_folder={folder}", "run=run", "device=cpu"]
    folders = ("long", "short", "two")
    try:
        made = export(compose("export", [*given, "export.folder=" + str(run / "export")]))
    except UserError as error:
        if "cannot be put into the weights" not in str(error):
            raise
        row["long"] = row["short"] = "refused"
        folders = ("two",)
        made = export(
            compose("export", [*given, "export.folder=" + str(run / "export"), "export.runtime=transformers"])
        )
    size = _largest_logit(run / "model")
    for one in folders:
        found = [value for key, value in made["folders"][one].items() if key.endswith("logit_difference")]
        row[one] = float(np.max(found)) / size
    published = _tensors(base)
    row["names"] = (
        "yes"
        if all(_tensors(one) == published for one in (run / "model", *(run / "export" / f for f in folders)))
        else "no"
    )
    row["generate"] = _generates_alike(folder, run)


def _arguments_of(folder: Path, world: Path, base: Path, ranks: int) -> list[str]:
    model = ModelConfig(path=str(base))
    n_dims = load.spectrum_of(load.config_of(model), model).n_dims
    tail = [4.5, 5.0, 5.5, 6.0, 7.0, 8.0, 8.5][: n_dims - 1]
    return [
        f"runs_folder={folder}", f"data.path={world}/corpus", f"model.path={base}", "device=cpu", "threads=1",
        f"rope.target_window_tokens={tiny.L}", "rope=longrope2", "rope.factors=null", "rope.critical_index=1",
        f"rope.tail={tail}", "rope.attention_factor=1.1", "data.needles.wording=code", "data.needles.digits=4",
        f"data.segment_tokens={tiny.L}", f"parallel.sp={ranks}", "optim.steps=2", "optim.segments_per_step=2",
        "optim.warmup_steps=0", "optim.schedule=constant", "optim.lr=1e-3", "logger=jsonl", "model.dtype=float32",
        "engine.deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0}}",
    ]  # fmt: skip


def _corpus(root: Path) -> None:
    """Long documents, and short ones that are packed."""
    (root / "texts").mkdir()
    for number in range(80):
        words = [f"{'abcdefgh'[(number * i) % 8]}{'lmnor'[(number + i * i) % 5]}a" for i in range(10 + number % 20)]
        (root / "texts" / f"short{number}.txt").write_text(" ".join(words))
    tiny.make_corpus(root)


def publish(folder: Path, family: str) -> Path:
    """A folder as its owner publishes it: windows of 64 tokens, random weights."""
    torch.manual_seed(0)
    window = {"max_position_embeddings": tiny.L0, "vocab_size": tiny.VOCAB}
    values = {**SIZES, **{**FAMILIES, **MORE}[family], **window}
    if "original_max_position_embeddings" in values:
        values["original_max_position_embeddings"] = tiny.L0
    scaling = values.get("rope_scaling", {})
    if "long_factor" in scaling:
        values["max_position_embeddings"] = 4 * tiny.L0
    elif "yarn" in scaling.values():  # its own window is factor x original
        values["rope_scaling"] = {**scaling, "original_max_position_embeddings": tiny.L0 // int(scaling["factor"])}
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    if hasattr(config, "output_router_logits") and hasattr(config, "router_aux_loss_coef"):
        config.output_router_logits, config.router_aux_loss_coef = True, _ROUTER_LOSS
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2 if parameter.dim() > 1 else 1.0)
    model.save_pretrained(folder, max_shard_size="60KB")
    shutil.copytree(folder.parents[1] / "corpus" / "tokenizer", folder, dirs_exist_ok=True)
    return folder


def _train(rank: int, world: int, arguments: list[str]) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_SIZE=str(world))
    from lr2train.parallel import processes

    processes.stop = lambda: None  # the group is of the caller
    train(compose("train", arguments))


# ---- figures ----


@torch.no_grad()
def _load_difference(base: Path) -> float:
    ids = torch.arange(50)[None] * 7919 % tiny.VOCAB
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    return (load.load_whole(base)(ids).logits - theirs(ids).logits).abs().max().item()


@torch.no_grad()
def _largest_logit(model: Path) -> float:
    ids = torch.arange(50)[None] * 7919 % tiny.VOCAB
    return load.load_whole(model)(ids).logits.abs().max().item()


def _tensors(folder: Path) -> dict[str, tuple[int, ...]]:
    return {name: stored.shape for name, stored in safetensors_of(folder).items()}


def _loss_difference(arguments: list[str], base: Path, run: Path) -> float:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    ours = [line["loss"] for line in lines if "loss" in line]  # other lines hold held-out losses
    theirs = _reference_losses(
        compose("train", [*arguments, "name=reference"]), base, Factors.load(run / "factors.json")
    )
    return float(np.max([abs(a - b) / b for a, b in zip(ours, theirs, strict=True)]))  # nan where one is nan


def _reference_losses(config: Any, base: Path, factors: Factors) -> list[float]:
    """The losses of two steps of plain transformers in fp64 and torch's AdamW."""
    eager = {"attn_implementation": "eager"}
    if hasattr(AutoConfig.from_pretrained(base), "num_experts_per_tok"):
        eager["experts_implementation"] = "eager"  # the default takes no fp64
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64, **eager).train()
    own = model.base_model.rotary_emb  # of the short window: transformers' own
    table = rotary.install(model, factors)
    table.window = "long"
    loader = make_loader(
        Corpus.open(Path(config.data.path)), config.data, config.seed, 0, 1, config.optim.segments_per_step,
        original_window_tokens=factors.spectrum.window_tokens,
        target_window_tokens=factors.target_window_tokens if config.data.kind == "segments" else None,
    )  # fmt: skip
    optim = config.optim
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == matrix] for matrix in (True, False))
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=optim.lr, betas=(optim.betas[0], optim.betas[1]), eps=optim.eps,
    )  # fmt: skip
    losses = []
    for step in range(optim.steps):
        batches = loader.batches(step)
        parts = []
        for batch in batches:
            model.base_model.rotary_emb = table if batch.window == "long" else own
            parts.append(_segment_loss(model, batch))
        loss = sum(part[0] for part in parts) / sum(batch.n_target_tokens for batch in batches)
        losses.append(loss.item())
        optimizer.zero_grad()
        (loss + sum(part[1] for part in parts) / len(parts)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip)
        optimizer.step()
    return losses


def _segment_loss(model: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss of the tokens of a segment, and its router loss times the coefficient; each document alone."""
    labels = torch.from_numpy(labels_of(batch)).long()
    total, gates = torch.zeros((), dtype=torch.float64), []
    for start, stop in batch.spans:
        out = model(input_ids=torch.from_numpy(batch.tokens[start:stop].astype("int64"))[None], use_cache=False)
        total = total + F.cross_entropy(out.logits[0], labels[start:stop], reduction="sum", ignore_index=-100)
        gates.append(getattr(out, "router_logits", None))
    if not gates[0]:
        return total, torch.zeros((), dtype=torch.float64)
    code = sys.modules[type(model).__module__]
    layers = tuple(torch.cat(layer) for layer in zip(*gates, strict=True))
    n_choices = getattr(model, "num_experts_per_tok", None) or model.config.num_experts_per_tok
    balance = code.load_balancing_loss_func(layers, layers[0].shape[-1], n_choices)
    return total, balance * model.config.router_aux_loss_coef


def _generates_alike(folder: Path, run: Path) -> str:
    """Greedy tokens across L0 of `lr2train generate` and of plain transformers over ``two/``."""
    tokenizer = load.load_tokenizer(run / "model")
    prompt = tokenizer.decode((torch.arange(_PROMPT) * 7 % 300 + 20).tolist())
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"][:, :_PROMPT]
    prompt = tokenizer.decode(ids[0], skip_special_tokens=True)  # or it would begin with two BOS
    given = [f"runs_folder={folder}", "run=run", "device=cpu", f"generate.max_new_tokens={_NEW}"]
    (folder / "prompt.txt").write_text(prompt)
    ours = generate(
        compose("generate", [*given, f"generate.prompt_file={folder}/prompt.txt", "generate.temperature=0"])
    )
    two = AutoModelForCausalLM.from_pretrained(run / "export" / "two", trust_remote_code=True).eval()
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    stops = sorted(load.stop_ids_of(run / "model", tokenizer))
    new = two.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=_NEW, do_sample=False, eos_token_id=stops
    )
    theirs = tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)
    return "yes" if theirs == ours["text"] else f"no ({ours['text']!r}, {theirs!r})"


# ---- table ----

COLUMNS = ("family", "load", "search", "train", "evaluate", "names", "long", "short", "two", "generate")


def _misses(row: dict[str, Any]) -> bool:
    if "refused" in row or "failed" in row:
        return "failed" in row or row["family"] in FAMILIES
    figures = [(row[name], bound) for name, bound in BOUNDS.items() if isinstance(row[name], float)]
    worst = any(not figure <= bound for figure, bound in figures)  # nan too
    return worst or row["names"] != "yes" or row["generate"] != "yes"


def _print(rows: list[dict[str, Any]]) -> None:
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    for row in rows:
        if ending := next((one for one in ("refused", "failed") if one in row), None):
            print(f"| {row['family']} | {ending}: {row[ending]} |")
        else:
            print("| " + " | ".join(_cell(row.get(column, "-")) for column in COLUMNS) + " |")


def _cell(value: Any) -> str:
    return (f"{value:.1e}" if value else "0") if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
