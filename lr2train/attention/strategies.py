"""All strategies by the name that ``parallel.strategy`` gives them: ours, and ``package.module.NAME`` of a user's own
package.
"""

from __future__ import annotations

from lr2train.attention.gather import GATHER
from lr2train.attention.local import LOCAL
from lr2train.attention.ring import RING
from lr2train.attention.ring_flash_attn import RING_FLASH_ATTN
from lr2train.attention.strategy import Strategy
from lr2train.attention.ulysses import ULYSSES
from lr2train.attention.ulysses_ring import ULYSSES_RING
from lr2train.config.plugins import is_plugin, plugin

_ALL = (LOCAL, ULYSSES, RING, GATHER, ULYSSES_RING, RING_FLASH_ATTN)
STRATEGIES: dict[str, Strategy] = {strategy.name: strategy for strategy in _ALL}


def strategy_of(name: str) -> Strategy:
    """The strategy of a name.

    Raises:
        UserError: the name is a plug-in that cannot be imported or is no Strategy.
    """
    return plugin(name, "parallel.strategy", Strategy, "Strategy") if is_plugin(name) else STRATEGIES[name]
