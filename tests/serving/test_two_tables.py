"""two/ with its modelling file in plain transformers: exact in both windows, across the switch, and in batches."""

import functools

import pytest
import serving_families as families
import torch
from serving_families import L0, tokens
from transformers import AutoModelForCausalLM

from lr2train.model import decode
from lr2train.serving import folders

CARDS = dict.fromkeys(folders.FOLDERS, "a card")
NEW = 10
# gpt_neox and mixtral are published under other names, phi3 has a prepare_inputs_for_generation of its own,
# olmo2 keeps cos and sin in fp32
FAMILIES = ("llama", "phi3, own short table", "olmo2, norms of a projection", "gpt_neox, partial", "mixtral")
# bases that are extended already, pairs of dimensions that turn together, a RoPE for each layer type
FAMILIES += ("llama, llama3", "qwen2, yarn", "cohere, pairs", "olmo3, yarn in global layers")
FAMILIES += ("gemma3, linear in global layers",)
LENGTHS = {"stays short": 12, "reaches L0": L0 - NEW, "grows across L0": L0 - 4, "begins at L0": L0, "long": L0 + 15}


@pytest.fixture(scope="module", autouse=True)
def modules(tmp_path_factory):
    """transformers copies remote code into this folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """family -> (folder two/ in transformers with remote code, our model, our tables), in fp32."""

    @functools.cache
    def made(family: str):
        folder = tmp_path_factory.mktemp("w")
        trained = families.train(folder / "model", family, torch.float32)
        folders.write(trained.source("float32"), folder, ("two",), CARDS)
        theirs = AutoModelForCausalLM.from_pretrained(folder / "two", trust_remote_code=True).eval()
        assert type(theirs).__name__.startswith("LongRope2")
        assert theirs.__class__.__module__.startswith("transformers_modules")
        theirs.generation_config.eos_token_id = None  # every text has NEW new tokens
        return theirs, *trained.ours(torch.float32)

    return made


def our_text(model, table, prompt: torch.Tensor) -> list[int]:
    return [*prompt.tolist(), *decode.generate(model, table, prompt.tolist(), NEW, L0)]


def our_logits(model, table, text: torch.Tensor) -> torch.Tensor:
    """Logits [1, T, V] of a whole text."""
    table.window = decode.window_of(text.shape[1], L0)
    with torch.no_grad():
        return model(text, use_cache=False).logits


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (found - wanted).abs().max() < 2e-5 * wanted.abs().max()


GENERATION = {
    "": {},
    "chunks": {"prefill_chunk_size": 9},
    "static": {"cache_implementation": "static"},
    "static, chunks": {"cache_implementation": "static", "prefill_chunk_size": 9},
    "no cache": {"use_cache": False},
}
CASES = [("llama", how) for how in GENERATION] + [(FAMILIES[1], ""), (FAMILIES[1], "static")]
CASES += [(family, "") for family in FAMILIES[2:]]


@pytest.mark.parametrize(("family", "how"), CASES)
def test_each_text_alone(world, family, how):
    theirs, model, table = world(family)
    for length in LENGTHS.values():
        prompt = tokens(length, seed=length)
        found = theirs.generate(
            prompt, max_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True,
            **GENERATION[how],
        )  # fmt: skip
        assert found.sequences[0].tolist() == our_text(model, table, prompt[0])
        for step in (0, 5, NEW - 1):
            text = found.sequences[:, : length + step]
            assert_close(found.logits[step], our_logits(model, table, text)[:, -1])


@pytest.mark.parametrize(("family", "how"), CASES)
def test_texts_of_both_windows_in_one_padded_batch(world, family, how):
    theirs, model, table = world(family)
    prompts = [tokens(length, seed=length)[0] for length in LENGTHS.values()]
    width = max(map(len, prompts))
    ids, mask = torch.zeros(len(prompts), width, dtype=torch.long), torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
    found = theirs.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **GENERATION[how])
    for row, prompt in zip(found, prompts, strict=True):
        assert row[width - len(prompt) :].tolist() == our_text(model, table, prompt)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_forward_of_a_padded_batch(world, family, side):
    """As evaluations call it."""
    theirs, model, table = world(family)
    texts = [tokens(length, seed=length) for length in LENGTHS.values()]
    width = max(text.shape[1] for text in texts)
    ids, mask = torch.zeros(len(texts), width, dtype=torch.long), torch.zeros(len(texts), width, dtype=torch.long)
    places = [slice(width - text.shape[1], None) if side == "left" else slice(text.shape[1]) for text in texts]
    for row, (text, place) in enumerate(zip(texts, places, strict=True)):
        ids[row, place], mask[row, place] = text[0], 1
    with torch.no_grad():
        found = theirs(input_ids=ids, attention_mask=mask, use_cache=False).logits
    for row, (text, place) in enumerate(zip(texts, places, strict=True)):
        assert_close(found[row : row + 1, place], our_logits(model, table, text))


def test_beams_cross_the_switch(world):
    """Each beam is a text of its own; the beams without a cache are the reference."""
    theirs, *_ = world("llama")
    prompt = tokens(L0 - 4)
    beams = {"num_beams": 3, "max_new_tokens": NEW, "do_sample": False}
    assert torch.equal(theirs.generate(prompt, **beams), theirs.generate(prompt, use_cache=False, **beams))


def test_a_conversation_goes_on_over_its_cache(world):
    """The second turn outgrows L0: its whole text is computed anew, although a cache comes with it."""
    theirs, model, table = world("llama")
    prompt = tokens(12)
    first = theirs.generate(prompt, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, tokens(L0 - 12, seed=3)], dim=1)
    whole = torch.ones_like(longer)  # some generated tokens are the padding's
    turn = {"attention_mask": whole, "past_key_values": first.past_key_values}
    second = theirs.generate(longer, **turn, max_new_tokens=NEW, do_sample=False)
    assert second[0].tolist() == our_text(model, table, longer[0])


def test_what_would_be_inexact_is_refused(world):
    theirs, *_ = world("llama")
    text = tokens(L0 + 4)
    cache = theirs(text[:, :L0]).past_key_values
    with pytest.raises(ValueError, match="its cache belongs to the short RoPE table"):
        theirs(text[:, L0:], past_key_values=cache)
    with pytest.raises(ValueError, match="its cache belongs to the short RoPE table"):
        theirs.generate(text, past_key_values=cache, prefill_chunk_size=2, max_new_tokens=2)
    with pytest.raises(ValueError, match="speculative"):
        theirs.generate(text, prompt_lookup_num_tokens=3)
    with pytest.raises(ValueError, match="speculative"):
        theirs.generate(text, assistant_model=theirs)
    with pytest.raises(ValueError, match="pass input_ids"):
        theirs.generate(inputs_embeds=theirs.get_input_embeddings()(text))
    with pytest.raises(ValueError, match="continuous batching"):
        theirs.init_continuous_batching()


def test_a_cast_to_bfloat16_leaves_the_tables_in_fp32(world):
    theirs, model, table = world("llama")
    text = tokens(L0 + 40)
    half = type(theirs)(theirs.config).eval()
    half.load_state_dict(theirs.state_dict())
    table.window = "long"
    with torch.no_grad():
        assert torch.equal(half.to(torch.bfloat16)(text).logits, model.to(torch.bfloat16)(text).logits)
    model.to(torch.float32)


def test_the_prompts_logits_are_not_made_for_every_token(world):
    """generate asks for the last token's logits where the signature of forward has logits_to_keep."""
    theirs, *_ = world("llama")
    assert theirs._supports_logits_to_keep()
