"""Several texts that decode together, against transformers' own ``generate`` for each text alone."""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from lr2train.model import decode, rotary
from lr2train.model.decode import Row
from lr2train.model.load import plain_config
from lr2train.rope import METHODS
from lr2train.rope import hf as rope_hf

L0, L, V = 24, 96, 64
SIZES = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": L0, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.4,  # so large that the next token depends on every position
}  # fmt: skip
LENGTHS = [7, 31, 20, 7]


@pytest.fixture(scope="module", params=["llama", "qwen3", "phi3", "mistral", "olmo3"])
def models(request):
    """(model with two tables, its table, {window: the same weights in plain transformers})."""
    own = {
        "phi3": {"original_max_position_embeddings": L0},
        "mistral": {"sliding_window": 9},
        "qwen3": {"head_dim": 8},
        # a RoPE for each layer type, of which the sliding layers keep theirs
        "olmo3": {
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        },
    }.get(request.param, {})
    torch.manual_seed(1)
    ours = AutoModelForCausalLM.from_config(AutoConfig.for_model(request.param, **SIZES, **own)).eval()
    spectrum = rope_hf.spectrum_of(plain_config(ours.config))
    factors = METHODS["longrope2"](
        spectrum, L, critical_index=1, tail=[5.0] * (spectrum.n_dims - 1), attention_factor=1.25
    )
    plain = {}
    for window in ("short", "long"):
        values = plain_config(ours.config)
        if window == "long":
            # one table for every length: transformers would choose by length
            values = rope_hf.write(values, factors)
            for name in ("rope_parameters", "rope_scaling"):
                rope = values.get(name) or {}
                rope = rope.get(rope_hf.GLOBAL, rope)
                rope |= {"short_factor": rope["long_factor"]} if rope else {}
        plain[window] = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(values.pop("model_type"), **values)
        ).eval()
        plain[window].load_state_dict(ours.state_dict())
    return ours, rotary.install(ours, factors), plain


AUTO = partial(decode.window_of, original_window_tokens=L0)
FIXED = {window: partial(decode.window_of, original_window_tokens=L0, window=window) for window in ("short", "long")}


def prompts(lengths=tuple(LENGTHS)) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, V, (length,), generator=generator).tolist() for length in lengths]


def rows_of(window, room: list[int], lengths=tuple(LENGTHS), stop_ids=frozenset()) -> list[Row]:
    pairs = enumerate(zip(prompts(lengths), room, strict=True))
    return [Row(prompt, n, window, stop_ids, seed=number) for number, (prompt, n) in pairs]


def texts(model, table, rows: list[Row], **how) -> list[list[int]]:
    """The new tokens of all rows."""
    for _ in decode.decode(model, table, rows, **how):
        pass
    return [row.tokens for row in rows]


def expected(model, prompt: list[int], n: int) -> list[int]:
    """transformers' generate; its end token is left out."""
    ids = torch.tensor([prompt])
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": n, "do_sample": False, "use_cache": True}
    said = model.generate(ids, **how)[0, len(prompt) :].tolist()
    return said[: said.index(2)] if 2 in said else said


def expected_across(plain, prompt: list[int], n: int) -> list[int]:
    """transformers' generate under the short table up to L0, and under the long one, without its cache, beyond."""
    first = expected(plain["short"], prompt, min(n, L0 + 1 - len(prompt))) if len(prompt) <= L0 else []
    if len(prompt) <= L0 and len(first) < min(n, L0 + 1 - len(prompt)):  # an end token
        return first
    return first + (expected(plain["long"], prompt + first, n - len(first)) if n > len(first) else [])


@pytest.mark.parametrize("window", ["short", "long"])
@pytest.mark.parametrize("chunk_tokens", [0, 5])
def test_rows_under_one_table_equal_generate(models, window, chunk_tokens):
    model, table, plain = models
    room = [12, 5, 30, 1]
    rows = rows_of(FIXED[window], room, stop_ids={2})
    found = texts(model, table, rows, chunk_tokens=chunk_tokens)
    assert found == [expected(plain[window], prompt, n) for prompt, n in zip(prompts(), room, strict=True)]
    for row, n in zip(rows, room, strict=True):
        assert row.finish == ("length" if len(row.tokens) == n else "end")
        assert row.table == window


def test_a_table_for_each_row_is_the_table_of_the_row_alone_bit_for_bit(models):
    _, table, _ = models
    windows, positions = ["long", "short", "long"], torch.tensor([[0, 40], [1, 41], [90, 7]])
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.zeros(3, 2, 1, dtype=dtype)
        table.window = windows
        together = table(x, positions)
        for row, table.window in enumerate(windows):
            alone = table(x, positions[row : row + 1])
            assert all(torch.equal(a[row : row + 1], b) for a, b in zip(together, alone, strict=True))


ACROSS = [1, L0 - 9, L0 - 1, L0, L0 + 1, L0 + 20, L0 - 9]  # two rows switch in one step
ROOM = [L0 + 6, 20, 1, 12, 15, 3, 20]


@pytest.mark.parametrize("chunk_tokens", [0, 7])
def test_each_row_has_its_own_table_and_its_own_switch(models, chunk_tokens):
    model, table, plain = models
    rows = rows_of(AUTO, ROOM, ACROSS, {2})
    found = texts(model, table, rows, chunk_tokens=chunk_tokens)
    for row, tokens, prompt, n in zip(rows, found, prompts(ACROSS), ROOM, strict=True):
        assert tokens == expected_across(plain, prompt, n)
        assert row.finish == ("length" if len(tokens) == n else "end")
    assert {row.table for row in rows} == {"short", "long"}


def test_a_row_alone_equals_the_row_in_a_batch_when_sampled_too(models):
    model, table, _ = models
    for how in ({}, {"temperature": 1.5, "top_p": 0.9}):
        together = texts(model, table, rows_of(AUTO, ROOM, ACROSS), **how)
        alone = [texts(model, table, [row], **how)[0] for row in rows_of(AUTO, ROOM, ACROSS)]
        assert together == alone
    twice = [Row(prompts()[0], 12, AUTO, seed=seed) for seed in (0, 1, 0)]
    first, other, same = texts(model, table, twice, temperature=1.5)
    assert first == same != other


def test_logits_at_the_switch_equal_a_whole_forward_under_the_long_table(models):
    """And those of the row beside it a whole forward under the short table."""
    model, table, plain = models
    rows, seen = rows_of(AUTO, [6, 6], [L0 - 2, 5]), []
    hook = model.get_output_embeddings().register_forward_hook(lambda _, __, logits: seen.append(logits.clone()))
    try:
        texts(model, table, rows, chunk_tokens=10)
    finally:
        hook.remove()
    assert len(seen) == 6
    for step, logits in enumerate(seen):
        for row, length, found in zip(rows, [L0 - 2, 5], logits, strict=True):
            whole = torch.tensor([(row.prompt + row.tokens)[: length + step]])
            with torch.no_grad():
                wanted = plain[AUTO(whole.shape[1])](whole, use_cache=False).logits[0, -1]
            assert (found - wanted).abs().max() < 2e-5 * wanted.abs().max()
    assert [AUTO(L0 - 2 + step) for step in range(6)] == ["short"] * 3 + ["long"] * 3


class Largest(TorchDispatchMode):
    """The most numbers that an operation returned in one tensor."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        is_view = function.is_view or "expand" in str(function)  # no memory of its own
        if isinstance(out, torch.Tensor) and not is_view:
            self.numbers = max(self.numbers, out.numel())
        return out


def test_a_prefill_in_chunks_holds_no_tensor_of_the_whole_prompt(monkeypatch):
    """Beside the cache: of a chunk the MLP's activations and the mask, whose size MASK_CELLS bounds."""
    torch.manual_seed(0)
    values = {**SIZES, "intermediate_size": 256, "max_position_embeddings": 4096, "num_key_value_heads": 1}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **values)).eval()
    table = rotary.install(model, METHODS["none"](rope_hf.spectrum_of(plain_config(model.config)), 4096))
    n_tokens, cache_numbers, largest = 3000, 8 * 3004, {}
    monkeypatch.setattr(decode, "MASK_CELLS", 2**16)
    for chunk_tokens in (0, 64):
        with Largest() as largest[chunk_tokens]:
            texts(model, table, rows_of(AUTO, [4], [n_tokens]), chunk_tokens=chunk_tokens)
    assert largest[0].numbers >= (n_tokens - 1) * 256
    assert largest[64].numbers <= max(2**16, 64 * 256, cache_numbers)


def test_chunks_cover_a_prompt_and_keep_their_bounds():
    for n_tokens, most in ((0, 8), (1, 8), (8, 8), (1000, 8), (131072, 8192)):
        chunks = list(decode._chunks(n_tokens, most))
        assert [at for chunk in chunks for at in range(*chunk)] == list(range(n_tokens))
        for start, stop in chunks:
            assert stop - start <= most and (start == 0 or (stop - start) * stop <= decode.MASK_CELLS)


def test_a_row_ends_where_its_reader_says(models):
    model, table, _ = models
    whole = texts(model, table, rows_of(FIXED["short"], [10] * 4))
    rows = rows_of(FIXED["short"], [10] * 4)
    for number in decode.decode(model, table, rows):
        if number == 1 and len(rows[1].tokens) == 3:
            rows[1].finish = "said"
    assert [row.tokens for row in rows] == [whole[0], whole[1][:3], *whole[2:]]
    assert [row.finish for row in rows] == ["length", "said", "length", "length"]


def test_logits_that_are_not_finite_end_their_row_alone():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES)).eval()
    spectrum = rope_hf.spectrum_of(plain_config(model.config))
    table = rotary.install(model, METHODS["none"](spectrum, L))
    with torch.no_grad():
        model.get_input_embeddings().weight[5] = float("nan")
    for how in ({}, {"temperature": 1.0}):
        good, bad = Row([7, 8, 9], 4, AUTO), Row([7, 5, 9], 4, AUTO)
        (alone,) = texts(model, table, [Row([7, 8, 9], 4, AUTO)], **how)
        assert texts(model, table, [good, bad], **how) == [alone, []]
        assert (good.finish, bad.finish) == ("length", "not finite")


def test_ranks_in_lockstep_make_as_many_calls_as_the_busiest():
    """What another rank needs is asked for by call; the results stay those of a rank alone."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES)).eval()
    table = rotary.install(model, METHODS["none"](rope_hf.spectrum_of(plain_config(model.config)), L))
    calls = []
    model.base_model.register_forward_pre_hook(lambda *_: calls.append("pass"))
    model.get_output_embeddings().register_forward_pre_hook(lambda *_: calls.append("head"))
    alone = texts(model, table, rows_of(FIXED["short"], [3] * 4))
    assert calls == [*["pass"] * 4, *["pass", "head"] * 3]  # four prompts, three tokens
    calls.clear()
    others = iter([10, 3, 1, 1, 1, 0])  # passes before each token of the other rank, and the token's own
    found = texts(
        model, table, rows_of(FIXED["short"], [3] * 4), lockstep=decode.Lockstep(lambda mine: max(mine, next(others)))
    )
    assert found == alone
    assert calls == [*["pass"] * 10, "head", *["pass"] * 3, "head", *["pass", "head"] * 3]
