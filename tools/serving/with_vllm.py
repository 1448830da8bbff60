"""Run a request in vLLM; see runtimes.py for the two files.

    PYTHON with_vllm.py request.json answer.json

Options: ``dtype``; ``plugin``: with lr2train's plugin, which has to be installed there; ``chunk_tokens``: of chunked
prefill, 0: vLLM's own; ``compile``: with torch.compile, and CUDA graphs on a GPU; ``prompt_logprobs``: false leaves
them out, as vLLM reads no prefix cache for a prompt that is scored; ``cached``: rows that have to find their beginning
in the prefix cache.
"""

import json
import os
import sys
from importlib.metadata import entry_points
from pathlib import Path

SCORED = 64
PLUGIN = "lr2train"
GROUP = "vllm.general_plugins"


def main(asked: Path, answer: Path) -> None:
    """Read the request, write the answer."""
    request = json.loads(asked.read_text())
    options = request["options"]
    names = [row["name"] for batch in request["batches"] for row in batch]
    missing = options.get("plugin") and not any(one.name == PLUGIN for one in entry_points(group=GROUP))
    # vLLM loads the plugins that this names; an empty text names none
    os.environ["VLLM_PLUGINS"] = PLUGIN if options.get("plugin") else ""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB; other devices do not read it
    import vllm

    rows, refused = {}, {}
    if missing:
        refused = dict.fromkeys(names, "the plugin is not installed: pip install ./serving/lr2train_vllm")
    else:
        try:
            rows, refused = run(request)
        except Exception as error:  # an engine that does not start raises what its parts raise
            refused = dict.fromkeys(names, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    answer.write_text(json.dumps({"runtime": f"vllm {vllm.__version__}", "rows": rows, "refused": refused}))


def run(request):
    """name -> row of the answer, name -> reason of a refusal."""
    import vllm

    options = request["options"]
    chunks = {"max_num_batched_tokens": options["chunk_tokens"]} if options.get("chunk_tokens") else {}
    engine = vllm.LLM(
        model=request["folder"],
        max_model_len=request["max_tokens"],
        dtype=options["dtype"],
        enforce_eager=not options.get("compile", False),
        enable_prefix_caching=bool(options.get("cached")),
        max_num_seqs=8,
        **chunks,
    )
    rows, refused = {}, {}
    for batch in request["batches"]:
        scored = {} if options.get("prompt_logprobs") is False else {"prompt_logprobs": 0}
        asked = [
            vllm.SamplingParams(temperature=0.0, max_tokens=row["new_tokens"], logprobs=0, ignore_eos=True, **scored)
            for row in batch
        ]
        prompts = [{"prompt_token_ids": row["prompt"]} for row in batch]
        for row, out in zip(batch, engine.generate(prompts, asked, use_tqdm=False), strict=True):
            if row["name"] in options.get("cached", ()) and not out.num_cached_tokens:
                refused[row["name"]] = "nothing of its beginning was found in the prefix cache"
            else:
                rows[row["name"]] = answered(out, row["prompt"])
    return rows, refused


def answered(out, prompt):
    """One row of the answer from vLLM's output."""
    tokens = list(out.outputs[0].token_ids)
    scored = [step[token].logprob for step, token in zip((out.prompt_logprobs or [])[1:], prompt[1:], strict=False)]
    new = [step[token].logprob for step, token in zip(out.outputs[0].logprobs, tokens, strict=True)]
    return {"logprobs": scored[-SCORED:], "tokens": tokens, "token_logprobs": new}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
