"""RoPE rescaling: spectrum, factors, methods, and their form in Hugging Face configs. numpy only: no model, no process
group.
"""

from lr2train.rope.factors import Factors
from lr2train.rope.methods import METHODS, build, made
from lr2train.rope.spectrum import Spectrum

__all__ = ["METHODS", "Factors", "Spectrum", "build", "made"]
