"""Text of records as text of a page or figure: shown literally, never obeyed."""

from __future__ import annotations

import math
import unicodedata

# control, format (bidirectional overrides too), unpaired surrogate, unassigned, line and paragraph separators
_UNSHOWN = ("Cc", "Cf", "Cs", "Cn", "Zl", "Zp")
LONGEST = 60


def plain(text: str) -> str:
    """Text without characters that show nothing, change the direction of others or are no XML."""
    return "".join(" " if unicodedata.category(c) in _UNSHOWN else c for c in text)


def short(text: str, longest: int = LONGEST) -> str:
    """Plain text cut in its middle to the width of a figure's label; its table has all of it."""
    cleaned = plain(text)
    if len(cleaned) <= longest:
        return cleaned
    tail = longest // 3
    return f"{cleaned[: longest - 1 - tail]}…{cleaned[-tail:]}"


def number(value: float | None) -> str:
    """Up to four significant digits; nothing where there is no number."""
    return "" if value is None or math.isnan(value) else f"{value:.4g}"


def joined(values: object) -> str:
    """Distinct non-empty texts in order of appearance, for captions."""
    found = dict.fromkeys(str(value) for value in values if value is not None and value == value)  # type: ignore[attr-defined]
    return ", ".join(text for text in found if text) or "–"
