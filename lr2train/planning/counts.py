"""Sizes and parameter counts of an architecture; memory and FLOPs follow from them.

Choice: the model is built on PyTorch's meta device, where tensors have shapes and no storage. The count is exact for
every architecture that transformers knows. Cost: a few seconds of imports. A closed formula would be faster, and wrong
for the next model family.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lr2train.config import ModelConfig, UserError
from lr2train.model import load


@dataclass(frozen=True)
class ModelCounts:
    """A causal LM in numbers.

    Attributes:
        name: the transformers class.
        parameters: of the whole model; tied ones count once.
        embedding_parameters: of the token embedding.
        head_parameters: of the output head; 0 where the head is tied to the embedding.
        layer_parameters: of one decoder layer.
        window_tokens: L0, the original window.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    key_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    parameters: int
    embedding_parameters: int
    head_parameters: int
    layer_parameters: int
    window_tokens: int

    @property
    def multiplied_parameters(self) -> int:
        """N': parameters that a token is multiplied with; an embedding counts only where the head is tied to it."""
        return self.parameters - (self.embedding_parameters if self.head_parameters else 0)

    @property
    def body_parameters(self) -> int:
        """Parameters outside the embedding and the head."""
        return self.parameters - self.embedding_parameters - self.head_parameters

    @property
    def largest_gathered_parameters(self) -> int:
        """Parameters of the largest module that ZeRO-3 gathers at once: a layer, the embedding or the head."""
        return max(self.layer_parameters, self.embedding_parameters, self.head_parameters)


def hf_config_of(model: ModelConfig) -> Any:
    """The transformers config of ``model.path``, or of ``model.architecture`` where no such folder exists.

    Nothing is downloaded.

    Raises:
        UserError: ``model.path`` is no folder and ``model.architecture`` is empty.
    """
    if model.path is not None and Path(model.path).expanduser().is_dir():
        return load.config_of(model)
    if not model.architecture:
        raise UserError(
            f"model.path={model.path} is no folder and model.architecture is empty; set model.path to a Hugging Face "
            "folder, or choose an experiment that holds an architecture (experiment=llama3_8b_128k)"
        )
    return load.config_of(replace(model, path=None))


def counts_of(hf_config: Any, model: ModelConfig) -> ModelCounts:
    """Count a model.

    Args:
        hf_config: the transformers config.
        model: ``original_window_tokens`` is read from it.

    Raises:
        UserError: lr2train cannot train this architecture.
    """
    lm = load.build_empty(hf_config, "bfloat16", lambda: torch.device("meta"))
    config = hf_config.get_text_config()
    embedding, head = lm.get_input_embeddings().weight, lm.get_output_embeddings().weight
    return ModelCounts(
        name=type(lm).__name__,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        key_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        vocabulary=config.vocab_size,
        parameters=_count(lm),
        embedding_parameters=embedding.numel(),
        head_parameters=0 if head is embedding else head.numel(),
        layer_parameters=_count(_first_layer(lm, config.num_hidden_layers)),
        window_tokens=load.spectrum_of(hf_config, model).window_tokens,
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _first_layer(lm: nn.Module, layers: int) -> nn.Module:
    return next(module[0] for module in lm.modules() if isinstance(module, nn.ModuleList) and len(module) == layers)
