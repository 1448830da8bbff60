"""long/ and short/ of every family, loaded by plain transformers, against our own two tables."""

import pytest
import serving_families as families
import torch
from safetensors.torch import load_file
from serving_families import FAMILIES, L0, tokens
from transformers import AutoConfig, AutoModelForCausalLM

from lr2train.config import UserError
from lr2train.model import load, rotary
from lr2train.serving import fold, folders

# transformers rotates (Cohere) or computes norms (Gemma) in fp32 there, whatever the model's dtype
LIMITS = {"cohere, pairs": 1e-5, "gemma3, linear in global layers": 1e-5}
CARDS = dict.fromkeys(folders.FOLDERS, "a card")


@pytest.fixture
def fp64(monkeypatch):
    """Folders in fp64, which no user can ask for."""
    monkeypatch.setitem(load.DTYPES, "float64", torch.float64)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double() - wanted.double()).abs().max() / wanted.double().abs().max()).item()


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_fp64(family, tmp_path, fp64):
    trained = families.train(tmp_path / "model", family, torch.float64)
    folders.write(trained.source("float64"), tmp_path, ("long", "short"), CARDS)
    model, table = trained.ours(torch.float64)
    long, short = tokens(L0 + 20), tokens(L0)
    found = families.loaded(tmp_path / "long", torch.float64)(long).logits
    table.window = "long"
    wanted = model(long).logits
    assert relative(found, wanted) < LIMITS.get(family, 1e-12)
    table.window = "short"
    assert relative(found, model(long).logits) > 1e-3, "the two windows differ, so the comparison says something"
    table.__class__ = rotary.WindowRotary
    found = families.loaded(tmp_path / "short", torch.float64)(short).logits
    assert torch.equal(found, model(short).logits), "bit for bit"


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_bf16(family, tmp_path):
    """A folded weight is rounded once, as an unfolded one, only elsewhere. So the folded model is as far from fp32 as
    the unfolded bf16 model: 0.2 to 1.24 times as far in these families, and 1.5 is the limit.
    """
    trained = families.train(tmp_path / "model", family, torch.float32)
    folders.write(trained.source("bfloat16"), tmp_path, ("long", "short"), CARDS)
    exact, table = trained.ours(torch.float32)
    model, own = trained.ours(torch.bfloat16)
    table.window = own.window = "long"
    text = tokens(L0 + 20, rows=4)
    wanted, rounded = exact(text).logits, model(text).logits
    found = families.loaded(tmp_path / "long", torch.bfloat16)(text).logits

    def distance(logits: torch.Tensor) -> float:
        return (logits.double() - wanted.double()).pow(2).mean().sqrt().item()

    assert distance(found) < 1.5 * distance(rounded)
    own.window = "short"
    short = families.loaded(tmp_path / "short", torch.bfloat16)(text[:, :L0]).logits
    assert torch.equal(short, model(text[:, :L0]).logits), "bit for bit"


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"model_type": "olmo", "clip_qkv": 0.2}, "computes other numbers with the factor in its weights"),
        (
            {"model_type": "falcon", "multi_query": True, "new_decoder_architecture": False},
            "has a query_key_value that",
        ),
        ({"model_type": "bloom"}, "has a query_key_value that|cannot be run alone"),
    ],
)
def test_an_attention_that_cannot_be_folded_is_refused(values, why):
    """A clamp after the projection, other fused rows, no rotation at all."""
    sizes = {**families.SIZES, **values}
    config = AutoConfig.for_model(sizes.pop("model_type"), **sizes)
    with torch.device("meta"):
        twin = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match=rf"cannot be put into the weights, because .*({why}).*export\.runtime=transf"):
        fold.rotated_rows(twin, 8)


def test_a_refused_fold_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setitem(FAMILIES, "olmo, clamped", {"model_type": "olmo", "clip_qkv": 0.2})
    trained = families.train(tmp_path / "model", "olmo, clamped", torch.float32)
    with pytest.raises(UserError, match="cannot be put into the weights"):
        folders.write(trained.source("float32"), tmp_path / "export", folders.FOLDERS, CARDS)
    assert not list((tmp_path / "export").iterdir())
    assert folders.write(trained.source("float32"), tmp_path / "export", ("two",), CARDS) == {"two": True}


def test_only_the_rotated_rows_change(tmp_path):
    """Bit for bit: every other tensor is the trained one, and a folded one is the fp32 product, rounded once."""
    trained = families.train(tmp_path / "model", "phi3, partial", torch.bfloat16)
    folders.write(trained.source("bfloat16"), tmp_path, ("long",), CARDS)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "long"))
    head = torch.arange(8) < 4  # a head's 8 dimensions, half of them rotated
    rows = torch.cat([head.repeat(4 + 2), (head & False).repeat(2)])
    for name, tensor in before.items():
        if name.endswith("qkv_proj.weight"):
            product = (tensor.float() * 1.3).to(torch.bfloat16)
            assert torch.equal(after[name], torch.where(rows[:, None], product, tensor))
        else:
            assert torch.equal(after[name], tensor)
    assert before.keys() == after.keys()
