"""vLLM plugin: both RoPE tables of an lr2train export in one server, exact in both windows.

vLLM takes one table for the whole process, from ``max_model_len``. This plugin gives each request the table of its own
total length, prompt and generated tokens together, as the model was trained. Three parts:

1. ``rotary``: vLLM's table is [short rows | long rows]. An offset for each token, 0 or L0, picks the row.
2. ``runner``: writes these offsets before each step.
3. ``scheduler``: preempts a request in the step in which it outgrows L0. vLLM then computes its cache anew. The
   prefix-cache hashes of the two tables differ, so that their blocks never mix.

Choice: vLLM calls ``register`` in each of its processes. Where a served folder has two tables and a window beyond L0,
the plugin sets the scheduler, the model runner and synchronous scheduling itself, so that no flag is needed. It refuses
what it cannot serve right (``refusals``). For every other model it does nothing. Cost: one prefill of L0 tokens for
each request that outgrows L0; one small copy to the device in each step; no async scheduling.
"""

RUN_WITH = ("0.32.0",)  # versions of vLLM, on CPU


def register() -> None:
    """Entry point of the group ``vllm.general_plugins``; may be called several times."""
    from lr2train_vllm import hooks

    hooks.install()
