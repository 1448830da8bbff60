"""The text of new tokens as they come, and the stop strings that end it.

Choice: only the last few tokens are decoded for each new one, so that a long text costs no more a token than a short
one. The final text is decoded whole. Cost: a tokenizer whose text of a token depends on tokens further back would show
another text on its way than at its end.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

_UNKNOWN = "\N{REPLACEMENT CHARACTER}"
_MOST_BYTES = 4  # of a character in UTF-8


class Text:
    """The text of one row.

    Args:
        tokenizer: of transformers.
        stops: strings that end the text; it is cut before the first of them.

    Attributes:
        stops: the stop strings.
        so_far: whole characters, special tokens left out.
        stopped: whether ``so_far`` has a stop string. A stop string that is a special token never shows in a text;
            ``special_stops`` gives its id.
    """

    def __init__(self, tokenizer: Any, stops: Collection[str] = ()):
        self._tokenizer, self.stops = tokenizer, tuple(filter(None, stops))
        self._reach = max(map(len, self.stops), default=1)
        self._first = self._border = 0  # the tokens that are decoded begin at _first; a later beginning is _border
        self._known = 0  # characters of them that are in so_far
        self.so_far, self.stopped = "", False

    def take(self, tokens: Sequence[int]) -> None:
        """Add the text of the tokens that are new since the last call.

        Args:
            tokens: of the row, from its first new token.
        """
        text = self._decoded(tokens[self._first :])
        # the bytes of a character may come in several tokens; until its last, its neighbours may be unknown too
        if text.endswith(_UNKNOWN) and len(tokens) - self._border < _MOST_BYTES:
            return
        whole = text[: 1 - _MOST_BYTES] + text[1 - _MOST_BYTES :].rstrip(_UNKNOWN)
        added = whole[self._known :]
        self._known = max(self._known, len(whole))
        if added and whole == text:
            self._first, self._border = self._border, len(tokens)
            self._known = len(self._decoded(tokens[self._first :]))
        self.so_far += added
        recent = self.so_far[-(len(added) + self._reach) :]
        self.stopped = self.stopped or any(stop in recent for stop in self.stops)

    @property
    def certain(self) -> str:
        """``so_far`` without what is, or may become, a stop string."""
        if self.stopped:
            return self.cut(self.so_far)
        text = self.so_far
        held = (size for stop in self.stops for size in range(1, len(stop)) if text.endswith(stop[:size]))
        return text[: len(text) - max(held, default=0)]

    def whole(self, tokens: Sequence[int]) -> str:
        """The final text of all tokens, cut before the first stop string."""
        return self.cut(self._decoded(tokens))

    def cut(self, text: str) -> str:
        """The part of a text before the first stop string."""
        return text[: min((at for stop in self.stops if (at := text.find(stop)) >= 0), default=len(text))]

    def _decoded(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)


def special_stops(tokenizer: Any, stops: Collection[str]) -> set[int]:
    """Ids of the stop strings that are special tokens."""
    known = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return {known[stop] for stop in stops if stop in known}
