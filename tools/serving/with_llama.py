"""Run a request in llama.cpp through llama-cpp-python; see runtimes.py for the two files.

    PYTHON with_llama.py request.json answer.json

The folder of the request is a GGUF. Options: ``dtype``: of the KV cache, float32 or else float16; ``attn_factor``: as
``--yarn-attn-factor``; ``original``: {"tokens": L0, "attn_factor": as above} of a second context, for texts of at most
L0 tokens. A text that outgrows the second context goes on in the first one, which computes the text anew. All texts of
a batch are decoded together.
"""

import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np

SCORED = 64
BATCH_TOKENS = 512


def main(asked: Path, answer: Path) -> None:
    """Read the request, write the answer."""
    request = json.loads(asked.read_text())
    options = request["options"]
    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, None)
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(request["folder"].encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp cannot load {request['folder']}")
    rows, refused = {}, {}
    for batch in request["batches"]:
        try:
            rows.update(run(model, batch, request["max_tokens"], options))
        except ValueError as error:
            refused.update({row["name"]: str(error) for row in batch})
    version = f"llama.cpp (llama-cpp-python {llama_cpp.__version__})"
    answer.write_text(json.dumps({"runtime": version, "rows": rows, "refused": refused}))


def run(model, batch, max_tokens, options):
    """name -> row of the answer."""
    answers = {row["name"]: {"logprobs": [], "tokens": [], "token_logprobs": []} for row in batch}
    original = options.get("original")
    if original:
        short = [row for row in batch if len(row["prompt"]) <= original["tokens"]]
        decode(model, short, answers, original["tokens"], original["attn_factor"], options["dtype"])
    begun = [row for row in batch if len(answers[row["name"]]["tokens"]) < row["new_tokens"]]
    decode(model, begun, answers, max_tokens, options.get("attn_factor", -1.0), options["dtype"])
    return answers


def decode(model, rows, answers, window_tokens, attn_factor, dtype):
    """Continue the answers of the rows in one context, until they are complete or longer than the window."""
    if not rows:
        return
    with Context(model, len(rows), window_tokens, attn_factor, dtype) as context:
        last = [context.prefill(text, row["prompt"], answers[row["name"]]) for text, row in enumerate(rows)]
        while True:
            live = []
            for text, row in enumerate(rows):
                said = answers[row["name"]]
                length = len(row["prompt"]) + len(said["tokens"])
                if len(said["tokens"]) == row["new_tokens"] or length > window_tokens:
                    continue
                said["tokens"].append(int(last[text].argmax()))
                said["token_logprobs"].append(float(last[text].max()))
                if len(said["tokens"]) < row["new_tokens"] and length < window_tokens:
                    live.append((text, length, said["tokens"][-1], True))
            if not live:
                return
            for (text, *_), logprobs in zip(live, context.feed(live), strict=True):
                last[text] = logprobs


class Context:
    """A context of llama.cpp for several texts of at most ``window_tokens`` tokens each."""

    def __init__(self, model, n_texts, window_tokens, attn_factor, dtype):
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = n_texts * window_tokens, n_texts, False
        params.n_batch = params.n_ubatch = BATCH_TOKENS
        params.yarn_attn_factor = attn_factor
        if dtype == "float32":
            params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.window_tokens = window_tokens
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self.context = llama_cpp.llama_init_from_model(model, params)
        if not self.context:
            raise ValueError(f"llama.cpp makes no context of {window_tokens} tokens")
        if (found := llama_cpp.llama_n_ctx_seq(self.context)) != window_tokens:
            raise ValueError(f"llama.cpp makes a context of {found} tokens in the place of {window_tokens}")
        self.batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        llama_cpp.llama_batch_free(self.batch)
        llama_cpp.llama_free(self.context)

    def prefill(self, text, prompt, said):
        """Compute the prompt and the new tokens of before; the log-probabilities [V] of the next token."""
        tokens = [*prompt, *said["tokens"]]
        if len(tokens) > self.window_tokens:
            raise ValueError(f"a text of {len(tokens)} tokens does not fit a context of {self.window_tokens}")
        first = max(1, len(prompt) - SCORED)
        scored = range(first, len(prompt)) if not said["tokens"] else range(0)
        wanted = {*(at - 1 for at in scored), len(tokens) - 1}
        found = []
        for start in range(0, len(tokens), BATCH_TOKENS):
            part = tokens[start : start + BATCH_TOKENS]
            found += self.feed([(text, at, token, at in wanted) for at, token in enumerate(part, start)])
        for at, logprobs in zip(scored, found, strict=False):
            said["logprobs"].append(float(logprobs[tokens[at]]))
        return found[-1]

    def feed(self, tokens):
        """Decode (text, position, id, whether the log-probabilities are wanted); the wanted ones, [V] each."""
        for n, (text, position, token, wanted) in enumerate(tokens):
            self.batch.token[n], self.batch.pos[n] = token, position
            self.batch.n_seq_id[n], self.batch.seq_id[n][0] = 1, text
            self.batch.logits[n] = wanted
        self.batch.n_tokens = len(tokens)
        if failed := llama_cpp.llama_decode(self.context, self.batch):
            raise ValueError(f"llama_decode fails with {failed}")
        return [self.logprobs(n) for n, (*_, wanted) in enumerate(tokens) if wanted]

    def logprobs(self, n):
        """Log-probabilities [V] in float64 after token ``n`` of the batch."""
        logits = llama_cpp.llama_get_logits_ith(self.context, n)
        logits = np.ctypeslib.as_array(logits, (self.n_vocab,)).astype(np.float64)
        logits -= logits.max()
        return logits - np.log(np.exp(logits).sum())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
