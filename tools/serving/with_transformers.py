"""Run a request in transformers 4 or 5; see runtimes.py for the two files.

    PYTHON with_transformers.py request.json answer.json

Options: ``dtype``; ``remote_code``: with the folder's modelling file; ``padding``: "left" | "right", of the batch whose
prompts are scored; ``chunk_tokens``: of chunked prefill, 0: none; ``cache``: as generate's ``cache_implementation``.
New tokens always come from left-padded batches.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

SCORED = 64


def main(asked: Path, answer: Path) -> None:
    """Read the request, write the answer."""
    request = json.loads(asked.read_text())
    model, options = load(request["folder"], request["options"]), request["options"]
    rows, refused = {}, {}
    for batch in request["batches"]:
        try:
            rows.update(run(model, batch, options))
        except ValueError as error:
            refused.update({row["name"]: str(error) for row in batch})
    said = {"runtime": f"transformers {transformers.__version__}", "rows": rows, "refused": refused}
    answer.write_text(json.dumps(said))


def load(folder, options):
    """The model in eval mode, without any token that ends a text."""
    remote = options.get("remote_code", False)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=remote)
    model: Any = model.to(dtype=getattr(torch, options["dtype"])).eval()
    if torch.cuda.is_available():
        model = model.cuda()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@torch.inference_mode()
def run(model, batch, options):
    """name -> row of the answer."""
    scored = [[] for _ in batch]
    if not options.get("chunk_tokens"):
        scored = score(model, [row["prompt"] for row in batch], options.get("padding", "left"))
    tokens, logprobs = generate(model, batch, options)
    return {
        row["name"]: {
            "logprobs": scored[n],
            "tokens": tokens[n][: row["new_tokens"]],
            "token_logprobs": logprobs[n][: row["new_tokens"]],
        }
        for n, row in enumerate(batch)
    }


def padded(prompts, side, device):
    """Ids and mask [B, T]."""
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long, device=device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        place = slice(width - len(prompt), width) if side == "left" else slice(0, len(prompt))
        ids[row, place], mask[row, place] = torch.tensor(prompt, device=device), 1
    return ids, mask


def score(model, prompts, side):
    """Log-probabilities of the last prompt tokens, as an evaluation gets them: one forward pass over the batch."""
    ids, mask = padded(prompts, side, model.device)
    given = {"attention_mask": mask} if len(prompts) > 1 else {}
    width = ids.shape[1]
    ends = [width if side == "left" else len(prompt) for prompt in prompts]
    kept = torch.tensor(sorted({t for end in ends for t in range(max(0, end - SCORED - 1), end)}), device=ids.device)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=kept, **given).logits.float()
    column = {int(t): n for n, t in enumerate(kept)}
    found = []
    for row, (prompt, end) in enumerate(zip(prompts, ends, strict=True)):
        targets = range(max(end - len(prompt) + 1, end - SCORED), end)
        logprobs = logits[row, [column[t - 1] for t in targets]].log_softmax(-1)
        found.append([logprobs[n, ids[row, t]].item() for n, t in enumerate(targets)])
    return found


def generate(model, batch, options):
    """Greedy ids and their log-probabilities, [B][new]."""
    ids, mask = padded([row["prompt"] for row in batch], "left", model.device)
    more = {"cache_implementation": options["cache"]} if options.get("cache") else {}
    if options.get("chunk_tokens"):
        more["prefill_chunk_size"] = options["chunk_tokens"]
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=max(row["new_tokens"] for row in batch),
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **more,
    )
    new = out.sequences[:, ids.shape[1] :]
    logprobs = torch.stack([step.float().log_softmax(-1) for step in out.logits], 1)
    return new.tolist(), logprobs.gather(2, new[..., None])[..., 0].tolist()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
