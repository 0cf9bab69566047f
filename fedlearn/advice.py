"""Write settings as a user types them: as words for a shell and Hydra, or as keyword arguments of Python.

An error has one line ``try``. The functions of this module write this line, so that it works as typed for any name.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping

__all__ = [
    "as_python",
    "assignment",
    "command",
    "is_typed",
    "label",
    "option",
    "quote_value",
    "shell_word",
    "with_group",
]

PLAIN_TEXT = re.compile(r"[A-Za-z_/][A-Za-z0-9_/.@%*+-]*", re.ASCII)  # Hydra reads such text without quotes
NUMBER = re.compile(r"[+-]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][+-]?\d[\d_]*)?|[+-]?(inf|nan)", re.IGNORECASE)
RESERVED = ("null", "true", "false", "inf", "nan")
ESCAPED_IN_KEYS = re.compile(r"([\\()\[\]{}:=, \t])")
INTERPOLATION = re.compile(r"(\\*)\$\{")  # start of a reference of OmegaConf, with the backslashes before it
PLAIN_WORD = re.compile(r"[A-Za-z0-9_@%+=:,./-]+", re.ASCII)  # a shell does not change such a word
WORD = re.compile(r"""(?:[^\s'"\\]|'[^']*'|"(?:\\.|[^"\\])*"|\\.)+""")
ASSIGNMENT = re.compile(r"""(['"]?)([+~]{0,2})([A-Za-z_][\w./-]*)=(.*)""", re.DOTALL)
COMMANDS = ("python", "pip", "fedlearn", "mv", "cp", "export", "ray", "flwr")  # first words of commands in advice
POLICY_LINE = re.compile(r"[\w.]+: \S.*")
OPEN_PART = re.compile(r"\.\.\.|\b(VALUE|COLUMN|NAME|FILE|FOLDER|DIR)\b|   \(|, or ")  # a user replaces it, or reads it
PYTHON_CODE = re.compile(r"(class|return) \w.*|[\w.]+\(.*\)")


def assignment(name: str, value: object) -> str:
    """Return ``name=value`` as a word for the command line, in quotes where Hydra or the shell needs them.

    >>> print(assignment("strategy.mu", 0.1), assignment("scenario.ignore", ["Cost [EUR]"]), assignment("init", None))
    strategy.mu=0.1 'scenario.ignore=["Cost [EUR]"]' init=null
    """
    return shell_word(f"{name}={quote_value(value)}")


def option(name: str, value: object) -> str:
    """Return an option and its value as words for the command line.

    >>> print(option("--id", "patient no"), option("--start", "-O"))
    --id 'patient no' --start=-O
    """
    text = shell_word(str(value))
    return f"{name}={text}" if str(value).startswith("-") else f"{name} {text}"


def command(*words: object) -> str:
    """Return words of a command line, in quotes where the shell needs them.

    >>> print(command("python -m simulations.resume", "my run"))
    python -m simulations.resume 'my run'
    """
    return " ".join([str(words[0]), *(shell_word(str(word)) for word in words[1:])])


def shell_word(text: str) -> str:
    """Return a text as one word for the shell, with the fewest quotes."""
    if PLAIN_WORD.fullmatch(text):
        return text
    if "'" in text and not re.search(r'["$`\\!]', text):
        return f'"{text}"'
    return shlex.quote(text)


def quote_value(value: object) -> str:
    """Return a value in Hydra's grammar of overrides, before the shell.

    >>> print(quote_value(["a", "b c", "1", 1, None, True]))
    [a,"b c","1",1,null,true]
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return f"{value}"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_escape_key(str(key))}:{quote_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(quote_value, value)) + "]"
    text = str(value)
    is_plain = PLAIN_TEXT.fullmatch(text) and text.lower() not in RESERVED and not NUMBER.fullmatch(text)
    return text if is_plain else _quote(INTERPOLATION.sub(r"\1\1\\${", text))


def _quote(text: str) -> str:
    """Return a text in double quotes of Hydra, which unescapes only backslashes before a quote."""
    return '"' + re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + (r"\"" if found[2] else ""), text) + '"'


def _escape_key(key: str) -> str:
    return ESCAPED_IN_KEYS.sub(r"\\\1", key)


def with_group(fix: str, group: str, belongs: Callable[[str], bool]) -> str:
    """Add the name of a group to the settings of this group.

    Args:
        fix: advice, as words for the command line.
        group: name of the group, e.g. ``privacy``.
        belongs: True for the names of settings that belong to the group.

    >>> with_group("noise_multiplier=1.0 strategy=fedavg", "privacy", lambda name: name != "strategy")
    'privacy.noise_multiplier=1.0 strategy=fedavg'
    """

    def prefixed(word: re.Match[str]) -> str:
        found = ASSIGNMENT.fullmatch(word[0])
        if not found or not belongs(re.split("[./]", found[3])[0]):
            return word[0]
        return f"{found[1]}{found[2]}{group}.{found[3]}={found[4]}"

    return WORD.sub(prefixed, fix)


def as_python(fix: str) -> str:
    """Return settings as keyword arguments of Python, or the text unchanged if it has other words.

    >>> as_python("epochs=1 steps=null"), as_python("weighting=examples"), as_python("privacy.clip=fixed")
    ('epochs=1, steps=None', "weighting='examples'", 'privacy.clip=fixed')
    """
    try:
        words = [ASSIGNMENT.fullmatch(word) for word in shlex.split(fix)]
    except ValueError:
        return fix
    arguments = [f"{word[3]}={_python_value(word[4])}" for word in words if word and word[3].isidentifier()]
    return ", ".join(arguments) if words and len(arguments) == len(words) else fix


def _python_value(text: str) -> str:
    if text.lower() in ("null", "true", "false"):
        return {"null": "None", "true": "True", "false": "False"}[text.lower()]
    if text[:1] == "[" and text[-1:] == "]":
        items = re.findall(r'"(?:\\.|[^"\\])*"|[^,]+', text[1:-1])
        return "[" + ", ".join(map(_python_value, items)) + "]"
    if text[:1] == '"':
        return repr(re.sub(r"\\(.)", r"\1", text[1:-1]))
    is_code = re.fullmatch(r"\(.*\)|\w+\(.*\)|'.*'", text) or NUMBER.fullmatch(text)
    return f"float({text!r})" if text.lower().lstrip("+-") in ("inf", "nan") else text if is_code else repr(text)


def is_typed(fix: str) -> bool:
    """Return whether a text can be typed: settings, options, a command, a line of a policy, or Python code.

    >>> [is_typed(fix) for fix in ("strategy.mu=0.1", "--client 0", "a larger file", "max_rounds: 200")]
    [True, True, False, True]
    """
    if OPEN_PART.search(fix):
        return False
    if POLICY_LINE.fullmatch(fix) or PYTHON_CODE.fullmatch(fix):
        return True
    try:
        first, *rest = shlex.split(fix) or [""]
    except ValueError:
        return False
    if first in COMMANDS:
        return True
    return all(ASSIGNMENT.fullmatch(word) or word.startswith("-") for word in (first, *rest)) or first.startswith("-")


def label(fix: str) -> str:
    """Return the line of an error with its advice: ``try`` for words to type, else ``advice``."""
    return f"  {'try' if is_typed(fix) else 'advice':<8}  {fix}"
