"""Files in the form that benchmarks publish, a tokenizer whose tokens are bytes, and what an answer scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lr2train.evaluation.request import Answer, Sample
from lr2train.evaluation.tokens import PromptTokenizer


def byte_tokenizer() -> PromptTokenizer:
    """One token a byte, and <s> before a prompt."""
    signs = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({sign: number for number, sign in enumerate(signs)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PromptTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>"))


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")


def said(task: Any, sample: Sample, text: str) -> float:
    """The grade that stands in tables."""
    grades = task.grade(sample, Answer("long", text=text))
    assert set(grades) == set(task.measures)
    return grades[task.measures[0]]
