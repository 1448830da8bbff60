"""Make the folders of an export from a base model, without training: for a check of runtimes on real weights.

    python tools/serving/extend.py BASE OUT --target 16384 --attention-factor 1.1

The factors are YaRN's, and the attention factor is given: so both differ from the base, as after training. The texts
that such a model writes beyond its window are worth nothing; every runtime has to write the same ones.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lr2train.config import ModelConfig, UserError
from lr2train.export import TOKENIZER_FILES
from lr2train.model import load
from lr2train.rope import METHODS
from lr2train.serving import engines, folders


def main() -> int:
    """Write the folders; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--target", type=int, required=True, help="target window in tokens")
    parser.add_argument("--original", type=int, help="original window in tokens; default: the base's own")
    parser.add_argument("--attention-factor", type=float, default=1.1, help="of the long window")
    asked = parser.parse_args()
    try:
        extend(asked.base, asked.out, asked.target, asked.attention_factor, asked.original)
    except UserError as error:
        print(f"extend: {error}", file=sys.stderr)
        return 2
    return 0


def extend(base: Path, out: Path, target_tokens: int, attention_factor: float, original_tokens: int | None) -> None:
    """Write ``long/``, ``short/`` and ``two/`` of a base model, in float32.

    Raises:
        UserError: the base cannot be loaded or extended.
    """
    hf_config = load.config_of(ModelConfig(path=str(base)))
    values = load.plain_config(hf_config)
    spectrum = load.spectrum_of(hf_config, ModelConfig(original_window_tokens=original_tokens))
    factors = replace(METHODS["yarn"](spectrum, target_tokens), attention_factor=attention_factor)
    companions = tuple(file for pattern in TOKENIZER_FILES for file in sorted(base.glob(pattern)))
    source = folders.Source(base, values, factors, "float32", companions)
    windows = engines.Windows(factors, source.short_factor, source.plain_short, source.values)
    cards = {name: engines.card(name, base.name, base.name, windows) for name in folders.FOLDERS}
    folders.write(source, out, folders.FOLDERS, cards)


if __name__ == "__main__":
    sys.exit(main())
