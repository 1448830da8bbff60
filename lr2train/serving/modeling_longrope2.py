"""A model with two RoPE tables, for transformers with ``trust_remote_code=True``: exact in both windows.

Texts of at most L0 tokens use the short table, longer texts the long one, each with its own attention factor. The table
is chosen for each text of a batch by its own length, padding left out. When a text outgrows L0 in ``generate``, the
cache is computed anew. transformers' own ``longrope`` has one attention factor, takes one table for a whole batch, and
keeps a cache across L0. Padding on either side, chunked prefill and static caches work; what would be inexact is
refused: a cache that a caller carries across L0, speculative decoding, continuous batching, and embeddings as a prompt.

Without ``trust_remote_code`` this file is not read, and the folder loads as plain ``longrope``.
"""

import contextlib
from typing import Any

import torch
import transformers
from torch import nn

Base: Any = transformers.LlamaForCausalLM
KEEPS_FP32 = False  # cos and sin stay in fp32, as in the architecture's own module
LAYOUT = "halves"  # of the angles: all of them twice ("halves"), each one twice ("pairs"), or "once"
GLOBAL = "full_attention"  # the layers with two tables, where each layer type has a RoPE


class TwoTables(nn.Module):
    """cos and sin of both windows. The tables are plain attributes in fp32: nothing that casts a model touches them.

    Attributes:
        original: L0 in tokens.
        fixed: layer type -> frequencies and attention factor, for layers with one table.
        lengths: [B] tokens of each text; None: the largest position tells.
    """

    def __init__(self, config, own_class: Any = None):
        super().__init__()
        rope: Any = getattr(config, "rope_parameters", None) or config.rope_scaling
        self.config, self.own_class = config, own_class  # the architecture's module has the tables of other layers
        self.others = [one for one in rope if one != GLOBAL] if GLOBAL in rope else []
        rope = rope.get(GLOBAL, rope)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.rope: Any = rope
        self.rotary_dim = int(head_dim * (rope.get("partial_rotary_factor") or 1.0))
        self.attention_scaling = float(rope["attention_factor"])
        self.original = int(rope["original_max_position_embeddings"])
        self.lengths: Any = None
        self.tables: Any = None
        self.fixed: Any = {}

    def _on(self, device):
        """Tables [2, D] and attention factors [2]; made at the first call: a model may be built on the meta device."""
        if self.tables is None or self.tables[0].device != device:
            with torch.device("cpu"):
                exponent = torch.arange(0, self.rotary_dim, 2, dtype=torch.int64).float() / self.rotary_dim
                power = self.rope["rope_theta"] ** exponent
                rescale = [torch.tensor(self.rope[f"{name}_factor"], dtype=torch.float32) for name in ("short", "long")]
                scales = [self.rope.get("short_mscale") or 1.0, self.attention_scaling]
                frequencies = torch.stack([1.0 / (factors * power) for factors in rescale])
                if exact := self.rope.get("short_inv_freq"):  # a base whose own table no factors give bit for bit
                    frequencies[0] = torch.tensor(exact, dtype=torch.float32)
                self.tables = frequencies.to(device), torch.tensor(scales, dtype=torch.float32).to(device)
                own: Any = self.own_class(self.config) if self.others else None
                for one in self.others:
                    scale = getattr(own, f"{one}_attention_scaling")
                    self.fixed[one] = getattr(own, f"{one}_inv_freq").float().to(device), scale
        return self.tables

    @torch.no_grad()
    def forward(self, x, position_ids, layer_type=None):
        """cos and sin [B, T, rotary_dim]; angles are computed in fp32."""
        frequencies, scales = self._on(x.device)
        if layer_type in self.fixed:
            inv_freq, scale = self.fixed[layer_type]
        else:
            lengths = position_ids.max(-1).values + 1 if self.lengths is None else self.lengths.to(x.device)
            window = (lengths > self.original).long()  # [B]: 0 short, 1 long
            inv_freq, scale = frequencies[window][:, None], scales[window][:, None, None]
        half = position_ids[..., None].float() * inv_freq
        angles = half if LAYOUT == "once" else torch.cat((half, half), -1)
        if LAYOUT == "pairs":
            angles = torch.repeat_interleave(half, 2, dim=-1)
        dtype = torch.float32 if KEEPS_FP32 else x.dtype
        return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


class LongRope2ForCausalLM(Base):
    """The architecture's own model over ``TwoTables``."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        self.base_model.rotary_emb = TwoTables(config, type(self.base_model.rotary_emb))
        self._prompt_lengths: Any = None  # [B], while a prompt is prefilled in chunks

    @property
    def _original(self):
        return self.base_model.rotary_emb.original

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        text_lengths=None,
        **kwargs,
    ):
        """As the architecture's own, and ``text_lengths`` [B]: tokens of each text, cached ones included.

        Raises:
            ValueError: a text outgrows L0 over a cache of the short table.
        """
        if text_lengths is None and attention_mask is not None and attention_mask.dim() == 2:
            text_lengths = attention_mask.sum(-1)
        if self._prompt_lengths is None and past_key_values is not None:
            given: Any = input_ids if inputs_embeds is None else inputs_embeds
            new = given.shape[1]
            self._refuse_a_cache_across_the_switch(int(past_key_values.get_seq_length()), new, text_lengths)
        self.base_model.rotary_emb.lengths = text_lengths
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def _crosses(self, cached, new, lengths):
        """Whether a text of the batch has at most L0 tokens in the cache and more with the new ones."""
        if cached == 0 or cached + new <= self._original:
            return False
        if lengths is None:
            return cached <= self._original
        return bool(((lengths - new <= self._original) & (lengths > self._original)).any())

    def _refuse_a_cache_across_the_switch(self, cached, new, lengths):
        if self._crosses(cached, new, lengths):
            raise ValueError(
                f"a text outgrows {self._original} tokens, and its cache belongs to the short RoPE table; compute the "
                "whole text anew without past_key_values, or let generate do it"
            )

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, attention_mask=None, next_sequence_length=None, **kwargs
    ):
        """As the architecture's own; at the switch the cache is dropped, and the whole text is computed anew."""
        cached = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
        positions = kwargs.get("cache_position")  # transformers 4
        new = next_sequence_length or (input_ids.shape[1] if positions is None else len(positions))
        if self._prompt_lengths is not None:
            lengths = self._prompt_lengths
            if positions is not None:
                kwargs.pop("position_ids", None)  # of chunks they count padding in; the mask tells better
        elif attention_mask is not None and attention_mask.dim() == 2:
            lengths = attention_mask.sum(-1)
        else:
            lengths = torch.full((len(input_ids),), cached + new, device=input_ids.device)
        if past_key_values is not None and self._prompt_lengths is None and self._crosses(cached, new, lengths):
            if input_ids.shape[1] < cached + new:  # the caller kept the ids of the cached tokens
                self._refuse_a_cache_across_the_switch(cached, new, lengths)
            if past_key_values.is_compileable:
                past_key_values.reset()  # a static cache keeps its memory
            else:
                past_key_values = None
            next_sequence_length = None
            if positions is not None:
                kwargs["cache_position"] = torch.arange(input_ids.shape[1], device=input_ids.device)
        if next_sequence_length is not None:
            kwargs["next_sequence_length"] = next_sequence_length
        inputs = super().prepare_inputs_for_generation(
            input_ids, past_key_values=past_key_values, attention_mask=attention_mask, **kwargs
        )
        return {**inputs, "text_lengths": lengths}

    @contextlib.contextmanager
    def _whole_prompt(self, input_ids, generation_config, cache, mask):
        """Each chunk of a prompt uses the table of the whole prompt."""
        if generation_config.prefill_chunk_size is not None:
            cached = int(cache.get_seq_length()) if cache is not None else 0
            width = getattr(generation_config, "_mask_length", None) or input_ids.shape[1]
            lengths = torch.full((len(input_ids),), width, device=input_ids.device) if mask is None else mask.sum(-1)
            self._refuse_a_cache_across_the_switch(cached, width - cached, lengths)
            self._prompt_lengths = lengths
        try:
            yield
        finally:
            self._prompt_lengths = None

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        cache, mask = model_kwargs.get("past_key_values"), model_kwargs.get("attention_mask")
        with self._whole_prompt(input_ids, generation_config, cache, mask):
            return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def _prefill_chunking(self, input_ids, generation_config, **kwargs):  # transformers 4
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        with self._whole_prompt(input_ids, generation_config, cache, mask):
            return super()._prefill_chunking(input_ids, generation_config, **kwargs)

    def generate(self, *args, **kwargs):
        """As the architecture's own, and exact across the switch.

        Raises:
            ValueError: speculative decoding, or embeddings as a prompt.
        """
        asked = kwargs.get("generation_config") or self.generation_config
        lookup = kwargs.get("prompt_lookup_num_tokens") or getattr(asked, "prompt_lookup_num_tokens", None)
        if kwargs.get("assistant_model") is not None or lookup:
            raise ValueError("speculative decoding would cross the switch of RoPE tables inexactly; leave it out")
        if kwargs.get("inputs_embeds") is not None:
            raise ValueError("the switch of RoPE tables computes the text anew from its ids; pass input_ids")
        return super().generate(*args, **kwargs)

    def init_continuous_batching(self, *args, **kwargs):
        """Refused: texts of both windows would share one flat batch."""
        raise ValueError("continuous batching would mix texts of both RoPE tables; use generate")


def _as_published():
    """Let transformers 5 rename this architecture's published tensors: it looks such rules up by the class's name."""
    try:
        from transformers import conversion_mapping
    except ImportError:  # transformers 4 has no such rules
        return
    if rules := conversion_mapping.get_checkpoint_conversion_mapping(Base.__name__):
        name = LongRope2ForCausalLM.__name__
        conversion_mapping.register_checkpoint_conversion_mapping(name, rules, overwrite=True)


_as_published()
