"""Check ``engine.deepspeed``: DeepSpeed has to know each key, and no key of lr2train may decide the same thing.

Choice: DeepSpeed itself says which keys it knows. Its config reader gets a dictionary that records every look-up. Its
pydantic models refuse unknown keys inside their sections. So this file holds no list that a later DeepSpeed could
outdate. Cost: DeepSpeed is imported where ``engine.deepspeed`` is set, which takes some seconds.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, KeysView, Mapping
from typing import Any

from lr2train.config import UserError, as_typed
from lr2train.training.deepspeed.start import quiet

_BATCH, _TYPE = "optim.segments_per_step", "model.dtype"
OURS = {
    "train_batch_size": _BATCH,
    "train_micro_batch_size_per_gpu": _BATCH,
    "gradient_accumulation_steps": _BATCH,
    "gradient_clipping": "optim.clip",
    "communication_data_type": "engine.reduce_dtype",
    "optimizer": "optim.lr, optim.betas, optim.eps and optim.weight_decay",
    "scheduler": "optim.schedule, optim.warmup_steps and optim.min_lr_ratio",
    "zero_optimization.stage": "engine.zero_stage",
    "fp16": _TYPE,
    "bf16": _TYPE,
    "bfloat16": _TYPE,
    "amp": _TYPE,
    "torch_autocast": _TYPE,
    "activation_checkpointing": "engine.recompute",
    "sequence_parallel_size": "parallel.sp",
}
"""Key of DeepSpeed's config -> the keys of lr2train that decide the same thing."""


def refuse_keys(given: Mapping[str, Any]) -> None:
    """Refuse a key of ``engine.deepspeed`` that lr2train decides, that DeepSpeed does not know, or whose value
    DeepSpeed does not accept.

    Raises:
        UserError: a key is refused; the text names the key.
    """
    if not given:
        return
    for key, value in _paths(given):
        if key in OURS:
            raise UserError(
                f"engine.deepspeed.{key}={as_typed(value)} is decided "
                f"by {OURS[key]}; remove it from engine.deepspeed and set "
                f"{OURS[key]}"
            )
    for key, value in _paths(given):
        if value == "auto":
            raise UserError(
                f"engine.deepspeed.{key}=auto: only Hugging Face's trainer knows auto; remove it to get DeepSpeed's "
                "default"
            )
    _ask_deepspeed(given)


def _paths(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key with its value, sections too: ``zero_optimization``, ``zero_optimization.stage`` …"""
    for key, value in values.items():
        yield f"{prefix}{key}", value
        if isinstance(value, Mapping):
            yield from _paths(value, f"{prefix}{key}.")


def _ask_deepspeed(given: Mapping[str, Any]) -> None:
    from pydantic import ValidationError

    with quiet():
        from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

        asked = _Asked({"train_micro_batch_size_per_gpu": 1, **given})
        try:
            DeepSpeedConfig(asked)  # type: ignore[arg-type]
        except ValidationError as error:
            raise UserError(_of_section(error, given)) from error
        except (DeepSpeedConfigError, AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"engine.deepspeed={dict(given)} is refused by DeepSpeed ({reason}); correct engine.deepspeed"
            ) from error
    for key in given:
        if key not in asked.keys_asked:
            raise UserError(f"engine.deepspeed.{key} is not a key of DeepSpeed's config{_near(key, asked.keys_asked)}")


class _Asked(dict[str, Any]):
    """A dictionary that records which keys are looked up."""

    def __init__(self, values: Mapping[str, Any]):
        super().__init__(values)
        self.keys_asked: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.keys_asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.keys_asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:  # type: ignore[override]
        """The value of a key."""
        self.keys_asked.add(key)
        return super().get(key, default)

    def keys(self) -> KeysView[str]:  # type: ignore[override]
        """A view whose membership test goes through ``__contains__``."""
        return KeysView(self)


def _of_section(error: Any, given: Mapping[str, Any]) -> str:
    """The first refusal of a pydantic model of DeepSpeed, with the full path of the key."""
    first = error.errors()[0]
    inside = ".".join(str(part) for part in first["loc"])
    key = next(
        (path for path, value in _paths(given) if path.endswith(f".{inside}") and value == first["input"]), inside
    )
    if first["type"] == "extra_forbidden":
        meant = _near(str(first["loc"][-1]), _keys_of_sections())
        return f"engine.deepspeed.{key} is not a key of DeepSpeed's config{meant}"
    return f"engine.deepspeed.{key}={first['input']} is refused by DeepSpeed ({first['msg']}); correct it"


def _keys_of_sections() -> set[str]:
    """The keys of all sections of DeepSpeed's config, as a user writes them."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    known = [DeepSpeedConfigModel]
    for one in known:  # grows while it is read: subclasses of subclasses
        known += one.__subclasses__()
    return {str(field.alias or name) for one in known for name, field in one.model_fields.items()}


def _near(key: str, known: set[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {close[0]}?" if close else "; remove it from engine.deepspeed"
