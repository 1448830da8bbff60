"""vLLM's ``longrope`` module with a table for each token, in the place of one table for the process."""

from __future__ import annotations

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.rotary_embedding.phi3_long_rope_scaled_rope import Phi3LongRoPEScaledRotaryEmbedding

from lr2train_vllm import windows
from lr2train_vllm.refusals import Refused


class TwoTablesRotary(Phi3LongRoPEScaledRotaryEmbedding):
    """As its base where the server has one table; the short rows follow from the folder's ``short_inv_freq``, if any.

    Attributes:
        row_offsets: int64 [tokens of a step], a buffer that the runner fills: 0 or L0 for each token. Its memory stays
            the same, so CUDA graphs read the newest offsets.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        config = get_current_vllm_config()
        self.per_request = windows.switch_of(config) is not None
        if not self.per_request:
            return
        n_rows = self.original_max_position_embeddings + self.max_position_embeddings
        if not self.use_long_rope or len(self.long_short_cos_sin_cache) != n_rows:
            raise Refused("vLLM's RoPE table is not the short rows followed by the long ones; use vLLM 0.32")
        self.use_long_rope = False  # the offset of a token comes from row_offsets
        rows = config.scheduler_config.max_num_batched_tokens
        self.register_buffer("row_offsets", torch.zeros(rows, dtype=torch.long), persistent=False)

    def _compute_inv_freq(self, rescale_factors):
        """As the base; ``rescale_factors`` is ``short_factor`` or ``long_factor`` itself."""
        rope = get_current_vllm_config().model_config.hf_text_config.rope_parameters
        exact = windows.short_frequencies(rope) if rescale_factors is self.short_factor else None
        return super()._compute_inv_freq(rescale_factors) if exact is None else torch.tensor(exact, dtype=torch.float32)

    def forward(self, positions, query, key=None, offsets=None):
        """As the base; ``offsets`` are the runner's."""
        if self.per_request:
            offsets = self.row_offsets[: positions.shape[0]]
        return super().forward(positions, query, key, offsets)
