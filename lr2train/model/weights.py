"""The weights of a model folder: which files count, what they hold, and which parameter each stored tensor becomes.

Choice: one path for every verb, whether a model is whole or divided over ranks. The plan (``conversions_of``) is made from names, shapes and dtypes
alone, on every rank, with the conversions that transformers itself applies: published tensors are renamed, stacked or cut as
``from_pretrained`` does. What does not fit is refused by name before a number is read. Then tensors are read group by group, so no rank ever
holds the whole model on its way in. Cost: every number is looked at once (9 GB/s on one core, a quarter of a warm load), and only after the
last of them is read does one know that all are finite.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lr2train import run
from lr2train.config import UserError
from lr2train.model import config_json
from lr2train.parallel import control
from lr2train.run import rank

Gather = Callable[[list[nn.Parameter]], contextlib.AbstractContextManager[Any]]
GROUP_BYTES = 512 * 2**20  # parameters gathered at one time while weights stream in or out
FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED = ("*.bin", "*.pt", "*.pth")
_QUANTIZED = re.compile(  # names that GPTQ, AWQ, bitsandbytes, HQQ, compressed-tensors, fp8 and mxfp4 give to what they store beside a weight
    r"(scale_inv|_scale|_scales|\.scales|qweight|qzeros|g_idx|absmax|quant_map|quant_state.*|\.SCB|weight_format|weight_packed|zero_point|_blocks)$"
)
_KNOWN = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is read when it is called.

    Attributes:
        shape: known before it is read.
        dtype: of torch; the code of safetensors where no model has such weights.
        read: returns the tensor.
        file: that holds it; empty for one in memory.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | str
    read: Callable[[], torch.Tensor]
    file: str = ""

    def __call__(self) -> torch.Tensor:
        return self.read()

    @classmethod
    def of(cls, tensor: torch.Tensor) -> StoredTensor:
        """One in memory."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def whole(_: list[nn.Parameter]) -> contextlib.AbstractContextManager[None]:
    """The gather of a model that is not partitioned."""
    return contextlib.nullcontext()


# ---- files ----


def files_of(folder: Path) -> list[Path]:
    """The files that decide what a model is: config.json, then those that hold its weights, by the index where there is one.

    Raises:
        UserError: there are no weights, only pickled ones, or two answers to which files count.
    """
    return [folder / config_json.NAME, *(folder / name for name in _weight_files(folder))]


def safetensors_of(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a model folder by name (memory-mapped: a tensor is read when it is asked for).

    Raises:
        UserError: as ``files_of``; a file is missing or damaged, a tensor is in two files, or in another one than the index says.
    """
    tensors: dict[str, StoredTensor] = {}
    for name in _weight_files(folder):
        for tensor, stored in _contents(folder / name).items():
            if tensor in tensors:
                raise UserError(
                    f"{folder} holds {tensor} twice, in {tensors[tensor].file} and {name}; remove the file that does not belong to the model"
                )
            tensors[tensor] = stored
    ignored = sorted(file.name for file in folder.glob("*.safetensors") if file.name not in _weight_files(folder))
    if ignored:
        run.say("model", f"{folder}: {_some(ignored)} not read, as {INDEX if _index(folder) else FILE} holds the model without")
    lost = [tensor for tensor, name in _index(folder).items() if tensor not in tensors or tensors[tensor].file != name]
    if lost:
        raise UserError(f"{folder / INDEX} names {len(lost)} tensors that are not where it says ({_some(lost)}); fetch the folder again")
    return tensors


def _weight_files(folder: Path) -> list[str]:
    """Names of the files that count, in order."""
    single, listed = (folder / FILE).exists(), sorted(set(_index(folder).values()))
    if single and listed and listed != [FILE]:
        raise UserError(f"{folder} holds {FILE} beside {INDEX}, which names other files, and loaders disagree; remove one of the two")
    if not single and not listed:
        pickled = sorted(file.name for pattern in _PICKLED for file in folder.glob(pattern))
        if pickled:
            raise UserError(
                f"{folder} holds pickled weights ({pickled[0]}), which could run code when they are read; save the model as safetensors with "
                "transformers first"
            )
        raise UserError(
            f"{folder} holds no .safetensors weights ({FILE}, or {INDEX} and the files that it names); set model.path to a complete folder"
        )
    return listed or [FILE]


def _index(folder: Path) -> dict[str, str]:
    """Tensor -> file; empty where there is no index."""
    file = folder / INDEX
    if not file.exists():
        return {}
    try:
        listed = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        good = bool(listed) and all(isinstance(name, str) and _inside(name) for name in listed.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        good = False
    if not good:
        raise UserError(f"{file} has no readable weight_map of tensor names to file names in this folder; fetch the folder again")
    return listed


def _inside(name: str) -> bool:
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def _contents(file: Path) -> dict[str, StoredTensor]:
    from safetensors import SafetensorError, safe_open

    try:
        opened = safe_open(file, framework="pt")
    except FileNotFoundError:
        raise UserError(f"{file} does not exist, although {INDEX} names it; fetch the folder again") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged or cannot be read ({error}); fetch it again") from error
    tensors = {}
    for name in opened.keys():  # noqa: SIM118 (no mapping)
        part = opened.get_slice(name)
        dtype = _KNOWN.get(part.get_dtype()) or str(part.get_dtype())
        tensors[name] = StoredTensor(tuple(part.get_shape()), dtype, partial(opened.get_tensor, name), file.name)
    return tensors


# ---- which stored tensor becomes which parameter ----


@dataclass(frozen=True)
class Conversion:
    """StoredTensor tensors that become some of a model's own together.

    Attributes:
        targets: parameters and buffers of the model, by name.
        sources: stored tensors, by name.
        make: target -> its value, from a function that reads a stored tensor by name.
    """

    targets: tuple[str, ...]
    sources: tuple[str, ...]
    make: Callable[[Callable[[str], torch.Tensor]], dict[str, torch.Tensor]]


def conversions_of(model: nn.Module, tensors: Mapping[str, StoredTensor]) -> list[Conversion]:
    """How stored tensors become the model, in the model's order; the same on every rank, and nothing is read.

    A parameter that has two names in the model (a tied head) may be stored under one of them, or under both.

    Args:
        model: on any device, the meta device too; not partitioned.
        tensors: by published name.

    Raises:
        UserError: a tensor of the model is missing or found twice, a stored one has no place in the model, or one has another shape or kind
            of dtype than the model wants.
    """
    wanted: dict[str, torch.Tensor] = dict(model.state_dict(keep_vars=True))
    collected, left_over = _collected(model, tensors, wanted)
    _refuse_left_over(model, left_over)
    parts = [_part(model, wanted, target, sources, converter, tensors) for target, (sources, converter) in collected.items()]
    made = Counter(target for part in parts for target in part.targets)
    twice = [target for target, times in made.items() if times > 1]
    if twice:
        raise UserError(f"the weights hold {_some(twice)} twice, under a former and a present name; keep one of the two")
    owner = owners(wanted)
    missing = set(owner.values()) - {owner[target] for target in made}
    if missing:
        raise UserError(
            f"the weights lack {len(missing)} tensors of the model ({_some([name for name in wanted if name in missing])}); set model.path "
            "to a complete folder of the same architecture"
        )
    position = {name: number for number, name in enumerate(wanted)}
    return sorted(parts, key=lambda part: min(position[target] for target in part.targets))


def owners(wanted: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """name -> the first name of the same tensor; another one where a head is tied."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in wanted.items()}


Collected = dict[str, tuple[list[str], Any]]  # target -> (stored names, transformers' WeightConverter or None)


def _collected(model: Any, tensors: Mapping[str, StoredTensor], wanted: dict[str, torch.Tensor]) -> tuple[Collected, dict[str, str]]:
    """StoredTensor names by what they become, and those that become nothing (stored name -> its name in the model's words).

    The rules and their order are those of ``transformers.core_model_loading.convert_and_load_state_dict_in_model``.
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
        if target not in wanted and name in wanted:
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
    """Raise UserError for stored tensors that have no place, but for those that transformers passes over (buffers of older versions)."""
    from transformers.utils.loading_report import LoadStateDictInfo

    info = LoadStateDictInfo(set(), set(left_over.values()), set(), [], {}, set())
    model._adjust_missing_and_unexpected_keys(info)
    strange = [name for name, target in left_over.items() if target in info.unexpected_keys]
    codes = [name for name in strange if _QUANTIZED.search(name)]
    if codes:
        raise UserError(config_json.quantized(f"the weights are quantized ({codes[0]})"))
    if strange:
        raise UserError(
            f"the weights hold {len(strange)} tensors that have no place in the model ({_some(strange)}); set model.path to a folder whose "
            "config.json belongs to its weights"
        )


def _part(
    model: Any, wanted: Mapping[str, torch.Tensor], target: str, sources: list[str], converter: Any, tensors: Mapping[str, StoredTensor]
) -> Conversion:
    """A part whose values are known to fit the model."""
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

    try:
        shapes = {name: tuple(value.shape) for name, value in make(lambda name: torch.empty(tensors[name].shape, device="meta")).items()}
    except (RuntimeError, ValueError, IndexError) as error:
        raise UserError(f"{_some(sources)} in the weights do not make up {target} ({config_json.brief(error)}); {_OTHER}") from error
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


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")


# ---- reading ----


def fill(model: nn.Module, parts: Sequence[Conversion], tensors: Mapping[str, StoredTensor], gather: Gather = whole) -> None:
    """Copy stored tensors into a built model, group by group.

    Args:
        model: of the same architecture as the one that ``parts`` were made with.
        parts: of ``conversions_of``.
        tensors: by published name, the same on every rank; read on rank 0 only when ``gather`` broadcasts, else on every rank.
        gather: context manager over a list of parameters that makes them whole and, on exit, spreads rank 0's values.

    Raises:
        UserError: a tensor cannot be read or holds a number that is not finite; on every rank, after all of them were read.
    """
    own = model.state_dict(keep_vars=True)
    reading = _TensorReader(tensors)
    for group in _groups(parts, own):
        parameters = {id(own[target]): own[target] for part in group for target in part.targets}
        gathered = [one for one in parameters.values() if isinstance(one, nn.Parameter)]
        with gather(gathered), torch.no_grad():
            for part in group:  # buffers are on every rank, and small
                if gather is whole or rank() == 0 or not isinstance(own[part.targets[0]], nn.Parameter):
                    reading.copy(part, own)
    refusal = reading.refusal() if gather is whole else control.from_rank_0(reading.refusal())
    if refusal:
        raise UserError(refusal)


def _groups(parts: Iterable[Conversion], own: Mapping[str, Any]) -> Iterator[list[Conversion]]:
    group: list[Conversion] = []
    size = 0
    for part in parts:
        size += sum(bytes_of(own[target]) for target in part.targets)
        group.append(part)
        if size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def bytes_of(tensor: Any) -> int:
    """Of a parameter when it is whole."""
    return getattr(tensor, "ds_numel", tensor.numel()) * tensor.element_size()


class _TensorReader:
    """Reads tensors and remembers what was wrong, so that no rank leaves the others alone in the middle of a gather."""

    def __init__(self, tensors: Mapping[str, StoredTensor]):
        self._tensors = tensors
        self._error = ""
        self._odd: dict[str, str] = {}

    def copy(self, part: Conversion, own: Mapping[str, torch.Tensor]) -> None:
        """Put the part's values into ``own``."""
        from safetensors import SafetensorError

        if self._error:
            return
        dtype = own[part.targets[0]].dtype
        try:
            for target, value in part.make(lambda name: self._read(name, dtype)).items():
                own[target].copy_(value)
        except (OSError, SafetensorError) as error:
            self._error = f"{_some(part.sources)} cannot be read ({config_json.brief(error)}); fetch the model folder again"

    def _read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The tensor in the model's dtype, as transformers casts before it stacks."""
        stored = self._tensors[name]()
        value = stored.to(dtype)
        if not all_finite(value):
            odd = int((~torch.isfinite(value)).sum())
            cast = f" in {str(dtype).removeprefix('torch.')}, which is too narrow" if all_finite(stored) else ""
            self._odd[name] = f"{odd} of the {value.numel()} numbers of {name} {'is' if odd == 1 else 'are'} not finite{cast}"
        return value

    def refusal(self) -> str:
        """What was wrong, in a sentence; empty where nothing was."""
        if self._error or not self._odd:
            return self._error
        first, *more = self._odd.values()
        others = f" ({len(more)} more tensors hold such numbers)" if more else ""
        narrow = "set the dtype to bfloat16 (model.dtype, or export.dtype in export)"
        remedy = narrow if first.endswith("narrow") else "set model.path to an intact copy of the model"
        return f"{first}{others}; {remedy}"


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether every number of a tensor is finite. A finite sum proves it in one pass; only an infinite one leaves it open."""
    if not tensor.is_floating_point() or not tensor.numel() or bool(torch.isfinite(tensor.sum())):
        return True
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor))
