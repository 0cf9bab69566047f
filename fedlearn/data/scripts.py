"""Find characters of scripts without spaces between words, such as Chinese, Japanese and Thai."""

from __future__ import annotations

import re

# Thai, Lao, Myanmar, Khmer, kana, ideographs, and their extensions
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
_RUN = re.compile(f"[{UNSPACED}]+")
_WORD = re.compile(r"\b\w\w+\b")  # the words of scikit-learn


def text_tokens(text: str) -> list[str]:
    """Return the words of a text in lower case. In a script without spaces, two neighbouring characters are a word.

    A run of one character is a word.

    >>> text_tokens("A good film"), text_tokens("很好看 film"), text_tokens("好")
    (['good', 'film'], ['film', '很好', '好看'], ['好'])
    """
    lower = text.lower()
    words = _WORD.findall(_RUN.sub(" ", lower))
    for run in _RUN.findall(lower):
        words += [run[place : place + 2] for place in range(max(1, len(run) - 1))]
    return words
