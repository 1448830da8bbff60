"""The weights of a model: the parameter that each stored tensor becomes, and reading them into a built model.

Choice: one path for every verb, whether the model is whole or divided over ranks. ``conversions_of`` maps stored
tensors to parameters from names, shapes and dtypes alone, alike on every rank, with transformers' own conversions:
published tensors are renamed, stacked or cut as ``from_pretrained`` does. A tensor that does not fit is refused by name
before any number is read. Then tensors are read group by group, so no rank ever holds a divided model whole. Cost:
every number is checked once (9 GB/s on one core, a quarter of a warm load), and numbers that are not finite are
reported after the whole read.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from lr2train.config import UserError
from lr2train.model import config_json
from lr2train.model.weight_files import StoredTensor, some_of
from lr2train.parallel import control
from lr2train.ranks import rank

Gather = Callable[[list[nn.Parameter]], contextlib.AbstractContextManager[Any]]
GROUP_BYTES = 512 * 2**20  # parameters gathered at one time while weights stream in or out
# Names of tensors that GPTQ, AWQ, bitsandbytes, HQQ, compressed-tensors, fp8 and mxfp4 store beside a quantized weight.
_QUANTIZED = re.compile(
    r"(scale_inv|_scale|_scales|\.scales|qweight|qzeros|g_idx|absmax|quant_map|quant_state.*|\.SCB|weight_format|"
    r"weight_packed|zero_point|_blocks)$"
)
_FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}


def whole(_: list[nn.Parameter]) -> contextlib.AbstractContextManager[None]:
    """The ``gather`` of a model that is not partitioned: does nothing."""
    return contextlib.nullcontext()


# ---- which stored tensor becomes which parameter ----


@dataclass(frozen=True)
class Conversion:
    """Stored tensors that together become parameters or buffers of a model.

    Attributes:
        targets: names in the model.
        sources: names of stored tensors.
        make: from a function that reads a stored tensor by name, the values by target.
    """

    targets: tuple[str, ...]
    sources: tuple[str, ...]
    make: Callable[[Callable[[str], torch.Tensor]], dict[str, torch.Tensor]]


def conversions_of(model: nn.Module, tensors: Mapping[str, StoredTensor]) -> list[Conversion]:
    """How stored tensors become the model, in the model's order; alike on every rank, and no number is read.

    A parameter with two names in the model (a tied head) may be stored under one name or under both.

    Args:
        model: on any device, the meta device too; not partitioned.
        tensors: by published name.

    Raises:
        UserError: a tensor of the model is missing or found twice; a stored tensor has no place in the model, or
            another shape or kind of dtype than the model wants.
    """
    wanted: dict[str, torch.Tensor] = dict(model.state_dict(keep_vars=True))
    collected, left_over = _collected(model, tensors, wanted)
    _refuse_left_over(model, left_over)
    conversions = [
        _conversion(model, wanted, target, sources, converter, tensors)
        for target, (sources, converter) in collected.items()
    ]
    made = Counter(target for conversion in conversions for target in conversion.targets)
    twice = [target for target, times in made.items() if times > 1]
    if twice:
        raise UserError(
            f"the weights hold {some_of(twice)} twice, under a former and a present name; keep one of the two"
        )
    owner = owners(wanted)
    missing = set(owner.values()) - {owner[target] for target in made}
    if missing:
        raise UserError(
            f"the weights lack {len(missing)} tensors of the model "
            f"({some_of([name for name in wanted if name in missing])}); set model.path "
            "to a complete folder of the same architecture"
        )
    position = {name: number for number, name in enumerate(wanted)}  # neighbours in the model are gathered together
    return sorted(conversions, key=lambda conversion: min(position[target] for target in conversion.targets))


def owners(wanted: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Name -> the first name of the same tensor; the two differ where a head is tied."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in wanted.items()}


Collected = dict[str, tuple[list[str], Any]]  # target -> (stored names, transformers' WeightConverter or None)


def _collected(
    model: Any, tensors: Mapping[str, StoredTensor], wanted: dict[str, torch.Tensor]
) -> tuple[Collected, dict[str, str]]:
    """Stored names by target, and the stored names without a target (stored name -> its name after transformers'
    renaming).

    Rules and order are those of ``transformers.core_model_loading.convert_and_load_state_dict_in_model``.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    collected: Collected = {}
    left_over: dict[str, str] = {}
    for name in sorted(tensors, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, wanted)
        if target not in wanted and name in wanted:  # a present name that a rule for former names would change
            target, pattern = rename_source_key(name, [], [], model.base_model_prefix, wanted)
        if target not in wanted:
            left_over[name] = target
            continue
        sources, converter = collected.setdefault(target, ([], copy.deepcopy(of_pattern[pattern]) if pattern else None))
        if sources and (pattern is None or converter is None):
            raise UserError(f"the weights hold {target} twice, as {sources[0]} and as {name}; keep one of the two")
        sources.append(name)
        if converter is not None:
            converter.add_tensor(target, name, pattern, name)  # the name stands for the tensor until it is read
    return collected, left_over


def _refuse_left_over(model: Any, left_over: Mapping[str, str]) -> None:
    """Raises UserError for stored tensors without a place, except those that transformers ignores (buffers of older
    versions).
    """
    from transformers.utils.loading_report import LoadStateDictInfo

    # transformers' own list of names that a family's code ignores.
    info = LoadStateDictInfo(set(), set(left_over.values()), set(), [], {}, set())
    model._adjust_missing_and_unexpected_keys(info)
    strange = [name for name, target in left_over.items() if target in info.unexpected_keys]
    codes = [name for name in strange if _QUANTIZED.search(name)]
    if codes:
        raise UserError(config_json.quantized(f"the weights are quantized ({codes[0]})"))
    if strange:
        raise UserError(
            f"the weights hold {len(strange)} tensors that have no place in the model ({some_of(strange)}); set "
            "model.path to a folder whose "
            "config.json belongs to its weights"
        )


def _conversion(
    model: Any,
    wanted: Mapping[str, torch.Tensor],
    target: str,
    sources: list[str],
    converter: Any,
    tensors: Mapping[str, StoredTensor],
) -> Conversion:
    """A conversion whose values are known to fit the model."""
    for name in sources:
        _refuse_other_kind(name, tensors[name].dtype, wanted[target].dtype)

    def make(read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        if converter is None:
            return {target: read(sources[0])}
        ready = copy.deepcopy(converter)
        for pattern, names in ready.collected_tensors.items():
            ready.collected_tensors[pattern] = [partial(read, name) for name in names]
        values = ready.convert(target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in values.items()}

    try:  # on the meta device: the conversion runs on shapes alone
        shapes = {
            name: tuple(value.shape)
            for name, value in make(lambda name: torch.empty(tensors[name].shape, device="meta")).items()
        }
    except (RuntimeError, ValueError, IndexError) as error:
        raise UserError(
            f"{some_of(sources)} in the weights do not make up {target} ({config_json.brief(error)}); {_OTHER}"
        ) from error
    for name, shape in shapes.items():
        if name not in wanted or shape != tuple(wanted[name].shape):  # copy_ would broadcast
            found = list(wanted[name].shape) if name in wanted else "no place"
            raise UserError(f"{name} has shape {list(shape)} in the weights and {found} in the model; {_OTHER}")
    return Conversion(tuple(shapes), tuple(sources), make)


_OTHER = "set model.path to a folder whose config.json belongs to its weights"


def _refuse_other_kind(name: str, stored: torch.dtype | str, wanted: torch.dtype) -> None:
    if (stored in _FLOATS) != wanted.is_floating_point:
        said = f"{name} is stored as {stored} where the model wants {wanted}"
        raise UserError(config_json.quantized(said) if wanted.is_floating_point else f"{said}; {_OTHER}")


# ---- reading ----


def fill(
    model: nn.Module, conversions: Sequence[Conversion], tensors: Mapping[str, StoredTensor], gather: Gather = whole
) -> None:
    """Copy stored tensors into a built model, group by group.

    Args:
        model: of the architecture that ``conversions`` were made for.
        conversions: from ``conversions_of``.
        tensors: by published name, the same on every rank; only rank 0 reads a partitioned parameter.
        gather: context manager that makes a list of parameters whole and, on exit, sends rank 0's values to all ranks.

    Raises:
        UserError: a tensor cannot be read, or holds a number that is not finite; raised on every rank, after all
            tensors were read.
    """
    own = model.state_dict(keep_vars=True)
    reader = TensorReader(tensors)
    for group in _groups(conversions, own):
        parameters = {id(own[target]): own[target] for conversion in group for target in conversion.targets}
        gathered = [one for one in parameters.values() if isinstance(one, nn.Parameter)]
        with gather(gathered), torch.no_grad():
            for conversion in group:  # buffers are on every rank, and small
                if gather is whole or rank() == 0 or not isinstance(own[conversion.targets[0]], nn.Parameter):
                    reader.copy(conversion, own)
    refusal = reader.refusal() if gather is whole else control.from_rank_0(reader.refusal())
    if refusal:
        raise UserError(refusal)


def _groups(conversions: Iterable[Conversion], own: Mapping[str, Any]) -> Iterator[list[Conversion]]:
    group: list[Conversion] = []
    size = 0
    for conversion in conversions:
        size += sum(bytes_of(own[target]) for target in conversion.targets)
        group.append(conversion)
        if size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def bytes_of(tensor: Any) -> int:
    """Size in bytes of a parameter when it is whole."""
    return getattr(tensor, "ds_numel", tensor.numel()) * tensor.element_size()


class TensorReader:
    """Reads tensors and collects errors instead of raising them: a rank that left in the middle of a gather would hang
    the others.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor]):
        self._tensors = tensors
        self._error = ""
        self._not_finite: dict[str, str] = {}

    def copy(self, conversion: Conversion, own: Mapping[str, torch.Tensor]) -> None:
        """Put the values of a conversion into ``own``."""
        from safetensors import SafetensorError

        if self._error:
            return
        dtype = own[conversion.targets[0]].dtype
        try:
            for target, value in conversion.make(lambda name: self.read(name, dtype)).items():
                own[target].copy_(value)
        except (OSError, SafetensorError) as error:
            why = config_json.brief(error)
            self._error = f"{some_of(conversion.sources)} cannot be read ({why}); fetch the model folder again"

    def read(
        self,
        name: str,
        dtype: torch.dtype,
        change: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The tensor, changed, in the model's dtype; it is cast before it is stacked, as in transformers."""
        stored = self._tensors[name]()
        value = (change(stored) if change else stored).to(dtype)
        if not all_finite(value):
            count = int((~torch.isfinite(value)).sum())
            cast = f" in {str(dtype).removeprefix('torch.')}, which is too narrow" if all_finite(stored) else ""
            self._not_finite[name] = (
                f"{count} of the {value.numel()} numbers of {name} {'is' if count == 1 else 'are'} not finite{cast}"
            )
        return value

    def refusal(self) -> str:
        """The collected errors as a sentence; empty where there are none."""
        if self._error or not self._not_finite:
            return self._error
        first, *more = self._not_finite.values()
        others = f" ({len(more)} more tensors hold such numbers)" if more else ""
        narrow = "set the dtype to bfloat16 (model.dtype, or export.dtype in export)"
        remedy = narrow if first.endswith("narrow") else "set model.path to an intact copy of the model"
        return f"{first}{others}; {remedy}"


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether every number of a tensor is finite. A finite sum proves it in one pass; an infinite sum may be an
    overflow.
    """
    if not tensor.is_floating_point() or not tensor.numel() or bool(torch.isfinite(tensor.sum())):
        return True
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor))
