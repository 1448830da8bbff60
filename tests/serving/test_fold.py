"""long/ and short/ of every family, loaded by plain transformers, against our own two tables."""

import pytest
import serving_families as families
import torch
from serving_families import FAMILIES, L0, tokens

from lr2train.model import load, rotary
from lr2train.serving import folders

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
    assert relative(found, wanted) < 1e-12
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
