"""What an error tells one to do, taken out of its text."""

import re

_REMEDY = re.compile(r"\bset ([a-z_]+(?:\.\w+)*)(?: to (?:such as )?|=)(\[[^\]]*\]|[^\s,;]+)")


def remedy_of(error: Exception) -> str:
    """``key=value`` of the first ``set KEY to VALUE`` or ``set KEY=VALUE`` in the text of an error."""
    found = _REMEDY.search(str(error))
    assert found, str(error)
    return f"{found[1]}={found[2]}"
