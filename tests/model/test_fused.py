"""Fused kernels: which modules are replaced, and that the replaced model computes what transformers' own does."""

import copy
import importlib.util
import os

import pytest
import torch
from serving_families import FAMILIES, SIZES
from transformers import AutoConfig, AutoModelForCausalLM

from lr2train.model import fused, rotary
from lr2train.model.fused import GATED, NORM, PLAIN, ROPE, NormForm
from lr2train.rope import METHODS
from lr2train.rope import hf as rope_hf

_INSTALLED = all(importlib.util.find_spec(package) for package in ("triton", "liger_kernel"))
INTERPRETED = _INSTALLED and os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = _INSTALLED and not INTERPRETED and torch.cuda.is_available()
WIDTHS = [torch.float32, torch.float16]  # the interpreter has no arithmetic in bfloat16
# (norms, rotations, gated activations) that are replaced, of two or four layers; the rest stays.
EXPECTED = {
    "llama": (5, 2, 2),
    "llama, tied": (5, 2, 2),
    "mistral": (5, 2, 2),
    "qwen2, biases": (5, 2, 2),
    "qwen3, norms of a head": (9, 2, 2),
    "phi3, partial": (5, 2, 2),
    "phi3, own short table": (5, 2, 2),
    "olmo2, norms of a projection": (9, 2, 2),
    "llama, llama3": (5, 2, 2),
    "qwen2, yarn": (5, 2, 2),
    "llama, linear": (5, 2, 2),
    "llama, dynamic": (5, 2, 2),
    "cohere, pairs": (0, 0, 2),  # its norm subtracts the mean; pairs turn together
    "glm, pairs, partial": (5, 0, 2),
    "gemma3, linear in global layers": (25, 4, 4),
    "olmo3, yarn in global layers": (17, 4, 4),
    "stablelm, partial, norms, biases": (0, 2, 2),  # layer norms
    "smollm3, a layer without RoPE": (5, 2, 2),
    "granite": (5, 2, 2),
    "mixtral": (5, 2, 0),  # experts are one parameter
    "gpt_neox, partial": (0, 2, 0),  # layer norms, no gate
}
FORMS = {
    "llama": NormForm(),
    "olmo2, norms of a projection": NormForm(0.0, True),
    "gemma3, linear in global layers": NormForm(1.0, True),
}


def tiny(family, dtype=torch.float32):
    """A model of a family with weights that differ from their initial ones and zeros, and our rotary module."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**SIZES, **FAMILIES[family]})
    config._experts_implementation = "eager"  # the default takes no fp64
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    spectrum = rope_hf.spectrum_of(config.to_dict())
    rotary.install(model, METHODS["yarn"](spectrum, 4 * spectrum.window_tokens)).window = "long"
    return model.to(dtype)


def computed(model):
    """(logits, gradient of every parameter) of 24 tokens."""
    tokens = torch.randint(40, (1, 24), generator=torch.Generator().manual_seed(1)).to(model.device)
    logits = model(input_ids=tokens, use_cache=False).logits
    logits.float().pow(2).sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def distance(ours, theirs):
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-30))


@pytest.mark.parametrize("family", FAMILIES)
def test_each_kind_of_module_is_replaced_where_its_form_is_known(family):
    own = tiny(family)
    replaced = copy.deepcopy(own)
    counts = fused.install(replaced, PLAIN)
    assert tuple(counts.get(kind, 0) for kind in (NORM, ROPE, GATED)) == EXPECTED[family]
    (logits, gradients), (expected, expected_gradients) = computed(replaced), computed(own)
    # The definitions in another order of operations: fp32 rounds at 6e-8, over four layers at most.
    assert distance(logits, expected) < 2e-6
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert distance(gradient, expected_gradients[name]) < 1e-5, name


@pytest.mark.parametrize("family", FORMS)
def test_the_form_of_a_norm_is_measured(family):
    model, seen = tiny(family), set()

    def note(x, weight, eps, form):
        seen.add(form)
        return fused.rms_norm(x, weight, eps, form)

    fused.install(model, PLAIN._replace(rms_norm=note))
    computed(model)
    assert seen == {FORMS[family]}


def test_every_replaced_module_calls_its_kernel():
    model, calls = tiny("phi3, partial"), []
    counting = PLAIN._replace(
        rms_norm=lambda *given: (calls.append(NORM), fused.rms_norm(*given))[1],
        rope=lambda *given: (calls.append(ROPE), fused.rope(*given))[1],
        joined_silu=lambda x: (calls.append(GATED), PLAIN.joined_silu(x))[1],
    )
    counts = fused.install(model, counting)
    computed(model)
    assert {kind: calls.count(kind) for kind in counts} == counts


def test_a_norm_with_another_epsilon_or_form_stays():
    class Shifted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.ones(32)), 1e-6

        def forward(self, x):
            return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)

    model = tiny("llama")
    model.model.norm = Shifted()
    assert fused.install(model, PLAIN)[NORM] == 4


def test_plain_modules_stay_without_cuda_or_when_switched_off():
    assert fused.chosen("off", torch.device("cuda")) == (None, "engine.fused=off")
    kernels, reason = fused.chosen("auto", torch.device("cpu"))
    assert kernels is None and "CUDA" in reason
    assert fused.announcement({}, reason) == f"fused kernels: none ({reason})"
    assert fused.announcement({NORM: 5, GATED: 2}, "why") == "fused kernels: 5 RMSNorm, 2 GLU (why)"


def interpret(replace):
    """Give Triton's interpreter what it lacks: float arguments as fp32 scalars, rsqrt and tanh of CUDA's library.

    ``replace`` sets an attribute of a module.
    """
    import numpy as np
    import triton.language as tl  # type: ignore[import-not-found]
    from liger_kernel.ops import geglu, rms_norm  # type: ignore[import-not-found]
    from triton.runtime import interpreter  # type: ignore[import-not-found]

    convert = interpreter._implicit_cvt

    def with_floats(value):
        if type(value) is not float:
            return convert(value)
        return tl.tensor(interpreter.TensorHandle(np.array([value], np.float32), tl.float32), tl.float32)

    replace(interpreter, "_implicit_cvt", with_floats)
    replace(rms_norm, "rsqrt", lambda x: tl.rsqrt(x))  # looked up while a kernel runs
    replace(geglu, "tanh", lambda x: 2 * tl.sigmoid(2 * x) - 1)


@pytest.mark.skipif(
    not (INTERPRETED or ON_GPU), reason="NOT CHECKED: needs triton, liger-kernel and a GPU or TRITON_INTERPRET=1"
)
@pytest.mark.parametrize("dtype", [*WIDTHS, torch.bfloat16] if ON_GPU else WIDTHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_ligers_kernels_compute_what_the_modules_do(family, dtype, monkeypatch):
    """No further from fp64 than twice transformers' own modules in the same dtype, and its rounding."""
    if INTERPRETED:
        interpret(monkeypatch.setattr)
    device = "cuda" if ON_GPU else "cpu"
    own = tiny(family, dtype).to(device)
    replaced, exact = copy.deepcopy(own), copy.deepcopy(own).double()
    counts = fused.install(replaced, fused.liger())
    assert tuple(counts.get(kind, 0) for kind in (NORM, ROPE, GATED)) == EXPECTED[family]
    (logits, gradients), (theirs, their_gradients), (truth, true_gradients) = map(computed, (replaced, own, exact))
    floor = 4 * torch.finfo(dtype).eps
    assert distance(logits, truth) < 2 * distance(theirs, truth) + floor
    for name, gradient in gradients.items():
        bound = 2 * distance(their_gradients[name], true_gradients[name]) + floor
        assert distance(gradient, true_gradients[name]) < bound, name
