"""500 seeded strings that are syntax somewhere, and what a page or a terminal may make of them."""

from __future__ import annotations

import random

COUNT = 500
_PIECES = (
    *("<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "</td></tr></table>", "</style>"),
    "<!-- bench:end -->",
    *('"', "'", "`", "``", "&", "&amp;", "&lt;b&gt;", "&#x27;", "{{ 7*7 }}", "{% raw %}", "${x}", "<", ">", "]]>"),
    *("|", "\\|", "\\", "\\\\", "*", "**b**", "_i_", "~~s~~", "#", "# h", "- item", "1. item", "> quote", "---", "==="),
    *("[t](http://evil.example/x)", "![i](//evil.example/p.png)", "<http://evil.example>", "http://evil.example/?q=1"),
    *("www.evil.example", "[r]: http://evil.example", "[^1]", "- [ ] task", ":bomb:", "[red]x[/red]", "[link=http://x]"),
    *("\n", "\r\n", "\r", "\t", "\0", "\v", "\f", "\x7f", "\x85", "\x9b31m", "\u2028", "\u2029", "\u00a0"),
    *("\u202e", "\u202d", "\u2066", "\u2069", "\u200b", "\u200d", "\ufeff", "\u00ad", "e\u0301", "\U000e0041"),
    *("\x1b[2J", "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\x1b]8;;http://evil.example\x1b\\x", "\x1b[8m", "\b\b\b"),
    *("=1+1", "=cmd|' /C calc'!A0", "+1", "-1", "@SUM(A1)", "＝1", '=HYPERLINK("http://e.example")', ";", ",", '""'),
    *("\\input{/etc/passwd}", "\\write18{id}", "$x^2$", "$$", "%", "100%", "a_b", "^", "~", "{", "}"),
    *("&", "\\\\[1ex]", "--", "---", "<<", "[1]", "\\catcode`\\%=12", "javascript:alert(1)", "data:text/html,x"),
    *("é", "漢", "𝔘", "\\end{tabular}"),
)  # fmt: skip
_FORMULA = tuple("=+-@\t\r＝＋－＠")


def strings() -> list[str]:
    """The same ones at every call. Each has a mark of its own at one of its ends, so that it can be found again."""
    draw = random.Random(5)
    found = []
    for number in range(COUNT):
        # every piece stands alone at both ends once, the rest are mixtures
        picked = [_PIECES[number // 2]] if number < 2 * len(_PIECES) else draw.choices(_PIECES, k=draw.randint(2, 5))
        text, mark = draw.choice(("", " ", "x")).join(picked), f"q{number}q"
        found.append(text + mark if number % 2 or text.startswith(_FORMULA) else mark + text)
    return found


def mark(text: str) -> str | None:
    """The mark that a shown text carries."""
    parts = [part for part in text.split("q") if part.isdecimal()]
    return f"q{parts[0]}q" if len(parts) == 1 else None


def printable(text: str) -> str:
    """The documented form: a blank for each character that shows nothing or turns the text around it."""
    return "".join(c if c.isprintable() else " " for c in text).strip()


def joined(text: str) -> str:
    """Without any blank, since terminals wrap and pad."""
    return "".join(text.split())
