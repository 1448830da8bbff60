"""The rotary module against transformers' own, bit for bit: both windows, partial rotation, low precision around it."""

import copy
import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lr2train.config import UserError
from lr2train.model import rotary
from lr2train.model.load import plain_config
from lr2train.rope import METHODS, Factors, Spectrum
from lr2train.rope import hf as rope_hf

L0, L = 2048, 131072
SIZES = {
    "vocab_size": 32, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": L0, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# every power of two and its neighbours, and every position whose float32 form is rounded by a bfloat16
POSITIONS = torch.tensor(
    sorted({p for e in range(17) for p in (2**e - 1, 2**e, 2**e + 1)} | set(range(0, L, 911)) | {L - 1})
)[None]


def model_of(family: str = "llama", dtype: torch.dtype = torch.float32, **changes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SIZES, **changes}), dtype=dtype)


def factors_for(model, attention_factor: float = 1.19) -> Factors:
    spectrum = rope_hf.spectrum_of(plain_config(model.config))
    rcd = spectrum.lowest_critical_index
    tail = [L / L0 * (1 + 0.7 * i / spectrum.n_dims) for i in range(spectrum.n_dims - rcd)]
    return METHODS["longrope2"](spectrum, L, critical_index=rcd, tail=tail, attention_factor=attention_factor)


def transformers_longrope(model, factors: Factors):
    """transformers' module for the config that an export writes."""
    values = rope_hf.write(plain_config(model.config), factors)
    return type(model.base_model.rotary_emb)(AutoConfig.for_model(values.pop("model_type"), **values))


def same_bits(ours, theirs) -> bool:
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(ours, theirs, strict=True))


FAMILIES = [
    ("llama", {}),
    *[("llama", {"head_dim": head_dim}) for head_dim in (72, 80, 96, 256)],
    ("qwen3", {"head_dim": 64}),
    ("phi3", {"partial_rotary_factor": 0.75}),
    ("phi3", {"partial_rotary_factor": 0.75, "hidden_size": 256}),  # Phi-4-mini's heads: 96 of 128 dimensions turn
    ("glm", {"partial_rotary_factor": 0.5, "head_dim": 80}),
    ("cohere", {}),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                "original_max_position_embeddings": 256}}),
    ("llama", {"max_position_embeddings": 512, "rope_scaling": {"rope_type": "yarn", "factor": 4.0,
                                                                "original_max_position_embeddings": 512}}),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "changes"), FAMILIES)
def test_both_tables_are_transformers_own_bit_for_bit(family, changes, dtype):
    model = model_of(family, **changes)
    factors = factors_for(model)
    own, longrope = model.base_model.rotary_emb, transformers_longrope(model, factors)
    table = rotary.install(model, factors)
    x = torch.zeros(1, dtype=dtype)
    assert same_bits(table(x, POSITIONS), own(x, POSITIONS))
    table.window = "long"
    assert POSITIONS.max() + 1 > L0, "transformers must be in its long window"
    assert same_bits(table(x, POSITIONS), longrope(x, POSITIONS))
    assert not same_bits(table(x, POSITIONS), own(x, POSITIONS))


def test_partial_rotation_rotates_its_part():
    model = model_of("phi3", partial_rotary_factor=0.75)
    table = rotary.install(model, factors_for(model))
    assert table(torch.zeros(1), POSITIONS)[0].shape == (1, POSITIONS.shape[1], 24)  # 0.75 x head_dim 32


def test_with_attention_factor_1_both_windows_are_transformers_longrope():
    """Then an exported model is exact in plain transformers on both sides of the switch."""
    model = model_of()
    factors = factors_for(model, attention_factor=1.0)
    longrope, table = transformers_longrope(model, factors), rotary.install(model, factors)
    x, short = torch.zeros(1), torch.arange(L0)[None]
    assert same_bits(table(x, short), longrope(x, short))
    table.window = "long"
    assert same_bits(table(x, POSITIONS), longrope(x, POSITIONS))


def test_no_cast_touches_the_tables():
    """A bfloat16 default dtype while building and ``.to(bfloat16)`` after it both ruin transformers' inv_freq at
    128k.
    """
    expected = {}
    table = rotary.install(model_of(), factors_for(model_of()))
    for table.window in rotary.WINDOWS:
        expected[table.window] = table(torch.zeros(1), POSITIONS)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = model_of(dtype=torch.bfloat16).to(torch.bfloat16)
        table = rotary.install(model, factors_for(model))
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    model.to(torch.bfloat16).half().bfloat16()
    for table.window in rotary.WINDOWS:
        assert same_bits(table(torch.zeros(1), POSITIONS), expected[table.window])


class DefaultDtypeRotary(LlamaRotaryEmbedding):
    """A module that computes its table in torch's default dtype, as model code is free to do."""

    def __init__(self, config):
        super().__init__(config)
        self.inv_freq = 1.0 / (10000.0 ** (torch.arange(0, 32, 2, dtype=torch.get_default_dtype()) / 32))


def test_a_table_that_was_built_in_bfloat16_is_rebuilt_in_float32():
    model = model_of()
    expected = model.base_model.rotary_emb(torch.zeros(1), POSITIONS)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model.base_model.rotary_emb = DefaultDtypeRotary(model.config)
        ruined = model.base_model.rotary_emb(torch.zeros(1), POSITIONS)
        table = rotary.install(model, factors_for(model))
    finally:
        torch.set_default_dtype(torch.float32)
    assert (ruined[0] - expected[0]).abs().max() > 1, "at 128k a bfloat16 frequency is noise"
    assert same_bits(table(torch.zeros(1), POSITIONS), expected)


def test_the_window_tag_selects_the_table_whatever_the_positions():
    model = model_of()
    table = rotary.install(model, factors_for(model))
    x, near, far = torch.zeros(1), torch.arange(4)[None], torch.arange(L - 4, L)[None]
    both = torch.cat([near, far], 1)
    for table.window in rotary.WINDOWS:
        together = table(x, both)
        assert same_bits([t[:, :4] for t in together], table(x, near))
        assert same_bits([t[:, 4:] for t in together], table(x, far))


def test_the_model_computes_with_the_table_of_the_window_tag():
    model, plain = model_of().eval(), model_of().eval()
    factors = factors_for(model)
    values = rope_hf.write(plain_config(plain.config), factors)
    longrope = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values)).eval()
    longrope.load_state_dict(plain.state_dict())
    table = rotary.install(model, factors)
    ids = torch.randint(32, (1, 12), generator=torch.Generator().manual_seed(0))
    far = torch.arange(L - 12, L)[None]
    with torch.no_grad():
        assert torch.equal(model(ids, position_ids=far).logits, plain(ids, position_ids=far).logits)
        table.window = "long"
        assert torch.equal(model(ids, position_ids=far).logits, longrope(ids, position_ids=far).logits)


PHI4 = {
    "hidden_size": 256, "partial_rotary_factor": 0.75, "max_position_embeddings": L,
    "original_max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48,
    "long_factor": [1.0 + i * i / 60 for i in range(48)]},
}  # fmt: skip


@pytest.mark.parametrize("kind", ["longrope", "yarn"])
def test_a_published_phi4_config_is_read_installed_and_run_as_in_transformers(kind):
    """Its published form (no attention factor: transformers takes LongRoPE's, for both windows), read, installed, and
    run in both windows.
    """
    config = copy.deepcopy(PHI4) | {"rope_scaling": {**PHI4["rope_scaling"], "type": kind}}
    model, plain = model_of("phi3", **copy.deepcopy(config)).eval(), model_of("phi3", **copy.deepcopy(config)).eval()
    assert (
        rope_hf.spectrum_of(plain_config(model.config))
        == rope_hf.spectrum_of(SIZES | config)
        == Spectrum(96, 10000.0, 4096)
    )
    factors = rope_hf.factors_of(plain_config(model.config))
    assert factors is not None
    assert factors == rope_hf.factors_of(SIZES | config)
    assert (factors.scale, list(factors.rescale)) == (32.0, PHI4["rope_scaling"]["long_factor"])
    assert factors.attention_factor == factors.short_attention_factor == math.sqrt(1 + math.log(32) / math.log(4096))

    own, table, x = plain.base_model.rotary_emb, rotary.install(model, factors), torch.zeros(1)
    ids = torch.randint(32, (1, 12), generator=torch.Generator().manual_seed(0))
    for table.window, positions in (("short", torch.arange(4096)[None]), ("long", POSITIONS)):
        assert same_bits(table(x, positions), own(x, positions))
        assert table(x, positions)[0].shape[-1] == 96
        last = positions[:, -12:]
        with torch.no_grad():
            assert torch.equal(model(ids, position_ids=last).logits, plain(ids, position_ids=last).logits)


@pytest.mark.parametrize("old", [False, True])
def test_phi4_extended_by_us_is_the_same_in_transformers(old):
    """Plain RoPE of 96 of 128 dimensions -> longrope2 factors -> a config -> transformers' own model; exact on both
    sides with factor 1.
    """
    rope = {"rope_theta": 10000.0, "partial_rotary_factor": 0.75}
    changes = {"hidden_size": 256} | (rope if old else {"rope_parameters": {"rope_type": "default", **rope}})
    model = model_of("phi3", **copy.deepcopy(changes), original_max_position_embeddings=L0).eval()
    factors = factors_for(model, attention_factor=1.0)
    assert factors.spectrum == Spectrum(96, 10000.0, L0)
    values = rope_hf.write(plain_config(model.config), factors)
    longrope = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values)).eval()
    longrope.load_state_dict(model.state_dict())
    table = rotary.install(model, factors)
    ids = torch.randint(32, (1, 12), generator=torch.Generator().manual_seed(0))
    for table.window, first in (("short", L0 - 12), ("long", L - 12)):
        positions = torch.arange(first, first + 12)[None]
        with torch.no_grad():
            assert torch.equal(model(ids, position_ids=positions).logits, longrope(ids, position_ids=positions).logits)


PLACES = {
    "the start": torch.arange(40)[None],
    "a sequence shard": torch.arange(5000, 5040)[None],
    "restarts of a packed segment": torch.cat([torch.arange(25), torch.arange(12), torch.arange(30)])[None],
    "two rows": torch.stack([torch.arange(40), torch.arange(3000, 3040)]),
}


@pytest.mark.parametrize("place", PLACES)
def test_the_long_table_is_the_same_wherever_positions_begin(place):
    """transformers enters its long window by the largest position, so one far position is added and left out of the
    comparison.
    """
    model, positions, x = model_of(), PLACES[place], torch.zeros(1)
    factors = factors_for(model)
    far = torch.cat([positions, torch.full((len(positions), 1), L - 1)], dim=1)
    expected = [part[:, :-1] for part in transformers_longrope(model, factors)(x, far)]
    table = rotary.install(model, factors)
    table.window = "long"
    assert same_bits(table(x, positions), expected)


def test_other_factors_replace_the_long_table_and_can_come_back():
    model, x, near = model_of(), torch.zeros(1), torch.arange(40)[None]
    factors = factors_for(model)
    table = rotary.install(model, factors)
    table.window = "long"
    first = table(x, near)
    table.use(METHODS["pi"](factors.spectrum, L))
    assert not same_bits(table(x, near), first)
    table.use(factors)
    assert same_bits(table(x, near), first)


def test_a_published_longrope_model_keeps_its_own_short_window():
    """Its short factors and its attention factor; a model that we exported names the short window's attention factor,
    1.
    """
    published = {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": L0, "factor": L / L0,
        "short_factor": [1.0 + 0.01 * i for i in range(16)], "long_factor": [1.0 + i for i in range(16)],
    }  # fmt: skip
    model = model_of(rope_parameters=published, max_position_embeddings=L)
    own, x, short = model.base_model.rotary_emb, torch.zeros(1), torch.arange(L0)[None]
    assert own.attention_scaling > 1
    factors = rope_hf.factors_of(plain_config(model.config))
    assert factors is not None
    expected = own(x, short)
    table = rotary.install(model, factors)
    assert same_bits(table(x, short), expected)

    ours = model_of(rope_parameters={**published, "short_mscale": 1.0}, max_position_embeddings=L)
    table = rotary.install(ours, factors)
    assert table.tables["short"][1] == 1.0


def test_factors_of_another_size_are_refused():
    model = model_of()
    with pytest.raises(UserError, match=r"factors have 8 entries, the model rotates 16 pairs; set rope\.factors"):
        rotary.install(model, METHODS["pi"](Spectrum(16, 10000.0, L0), L))
    assert not isinstance(model.base_model.rotary_emb, rotary.WindowRotary), "a refused model is left as it was"


def test_a_model_without_rotary_is_refused():
    gpt2 = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_embd=16, n_layer=1, n_head=2, vocab_size=32))
    with pytest.raises(UserError, match="GPT2LMHeadModel has no standard rotary_emb"):
        rotary.install(gpt2, METHODS["pi"](Spectrum(16, 10000.0, L0), L))


BY_LAYER_TYPE = {
    "olmo3": {
        "num_hidden_layers": 4, "sliding_window": 8, "rope_theta": 5e5,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    },
    "gemma3_text": {
        "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8,
        "head_dim": 32, "rope_local_base_freq": 100.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", BY_LAYER_TYPE)
def test_global_layers_have_two_tables_and_sliding_layers_keep_theirs(family, dtype):
    model = model_of(family, **copy.deepcopy(BY_LAYER_TYPE[family]))
    factors = factors_for(model)
    own, longrope = model.base_model.rotary_emb, transformers_longrope(model, factors)
    table, x = rotary.install(model, factors), torch.zeros(1, dtype=dtype)
    for table.window in rotary.WINDOWS:
        sliding = table(x, POSITIONS, "sliding_attention")
        assert same_bits(sliding, own(x, POSITIONS, "sliding_attention"))
        assert same_bits(sliding, longrope(x, POSITIONS, "sliding_attention"))
        wanted = own if table.window == "short" else longrope
        assert same_bits(table(x, POSITIONS, "full_attention"), wanted(x, POSITIONS, "full_attention"))
    assert not same_bits(own(x, POSITIONS, "full_attention"), longrope(x, POSITIONS, "full_attention"))


EXTENDED = [(family, changes) for family, changes in FAMILIES if "rope_scaling" in changes]
EXTENDED += [
    *BY_LAYER_TYPE.items(),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}),
    ("phi3", {**PHI4, "rope_scaling": PHI4["rope_scaling"] | {"short_factor": [1 + i / 60 for i in range(48)]}}),
]


class SlowRotary(torch.nn.Module):
    """cos and sin of every position and index, one by one, in fp64 from the formulas; sliding layers keep their own."""

    def __init__(self, factors, own):
        super().__init__()
        self.factors, self.own = factors, own

    def forward(self, x, position_ids, layer_type="full_attention"):
        if layer_type != "full_attention":
            return self.own(x, position_ids, layer_type)
        frequencies, factor = self.factors.inv_freq, self.factors.attention_factor
        angles = [[float(p) * f for f in [*frequencies, *frequencies]] for p in position_ids[0]]
        both = [[[[factor * turn(a) for a in row] for row in angles]] for turn in (math.cos, math.sin)]
        return tuple(torch.tensor(one).to(x.dtype) for one in both)


@torch.no_grad()
@pytest.mark.parametrize(("family", "changes"), EXTENDED)
def test_a_base_that_is_extended_already_computes_as_before_and_under_a_slow_reference(family, changes):
    model, base = model_of(family, **copy.deepcopy(changes)).eval(), model_of(family, **copy.deepcopy(changes)).eval()
    factors, ids = factors_for(model), torch.arange(3, 32)[None]
    table = rotary.install(model, factors)
    for first in (0, factors.spectrum.window_tokens - ids.shape[1]):
        positions = torch.arange(first, first + ids.shape[1])[None]
        assert torch.equal(model(ids, position_ids=positions).logits, base(ids, position_ids=positions).logits)
    table.window, positions = "long", torch.arange(100, 100 + ids.shape[1])[None]
    base.base_model.rotary_emb = SlowRotary(factors, base.base_model.rotary_emb)
    wanted = base(ids, position_ids=positions).logits
    found = model(ids, position_ids=positions).logits
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize(("family", "changes"), [*EXTENDED, ("phimoe", {})])
def test_a_written_config_still_knows_the_bases_own_table(family, changes):
    """Bit for bit, in the model of a run and in its export."""
    model = model_of(family, **copy.deepcopy(changes))
    factors = factors_for(model)
    values = rope_hf.write(plain_config(model.config), factors)
    trained = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
    for found, wanted in zip(rotary.short_table(trained), rotary.short_table(model), strict=True):
        assert torch.equal(torch.as_tensor(found), torch.as_tensor(wanted))
    again = rope_hf.spectrum_of(plain_config(trained.config))
    assert (again, again.attention_factor) == (factors.spectrum, factors.spectrum.attention_factor)


class OddRotary(LlamaRotaryEmbedding):
    """Rotates the other way."""

    def forward(self, x, position_ids):
        cos, sin = super().forward(x, position_ids)
        return cos.flip(-1), sin.flip(-1)


def test_a_rotation_that_is_not_known_is_refused():
    model = model_of()
    model.base_model.rotary_emb = OddRotary(model.config)
    with pytest.raises(UserError, match="LlamaForCausalLM computes its RoPE in a way that is not known here"):
        rotary.install(model, factors_for(model))
