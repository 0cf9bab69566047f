"""``fedlearn completion SHELL``: print a script with which a shell completes commands, options and settings."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml  # type: ignore[import-untyped]

from fedlearn.core.command_line import DONE, CommandParser, command_parser, run_command
from fedlearn.runner.conf_files import CONF_DIR, LOADER, installed_settings
from simulations.cli import MODULES

WITH_SETTINGS = ("audit", "deploy submit", "privacy-attack", "resume", "robustness", "run")  # commands with settings
GROUPS = tuple(sorted(path.name for path in CONF_DIR.iterdir() if path.is_dir()))
VALUES: Mapping[str, tuple[str, ...]] = {"framework": ("jax", "mixed", "torch")}
BASH = """\
_fedlearn_complete() {
    local IFS=$'\\n' line="${COMP_LINE:0:COMP_POINT}"
    local word="${line##* }"
    COMPREPLY=($(fedlearn completion --line "$line" 2>/dev/null))
    COMPREPLY=("${COMPREPLY[@]#"${word%"${word##*=}"}"}")  # bash completes the part after "="
}
complete -o default -o nospace -F _fedlearn_complete fedlearn
"""
SCRIPTS = {
    "bash": BASH,
    "zsh": f"autoload -U +X compinit bashcompinit && compinit && bashcompinit\n{BASH}",
    "fish": "complete -c fedlearn -a '(fedlearn completion --line (commandline -cp))'\n",
}


def build_parser() -> CommandParser:
    """Return the parser of the command."""
    parser = command_parser(
        "simulations.completion",
        "Print a script with which a shell completes commands, options and settings.",
        epilog='in ~/.bashrc: eval "$(fedlearn completion bash)"',
    )
    parser.add_argument("shell", nargs="?", choices=list(SCRIPTS), default="bash", help="shell (default: bash)")
    parser.add_argument("--line", metavar="TEXT", help="print the completions of a command line, for the script")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(build_parser(), write_completion, argv)


def write_completion(*, shell: str, line: str | None) -> int:
    """Print the script, or the completions of a command line. Return the exit code."""
    sys.stdout.write(SCRIPTS[shell] if line is None else "".join(f"{word}\n" for word in completions(line)))
    return DONE


def completions(line: str) -> list[str]:
    """Return the words that may replace the last word of a command line, sorted.

    >>> completions("fedlearn run strategy=fedp"), completions("fedlearn run strategy=fedprox strategy.m")
    (['strategy=fedper', 'strategy=fedprox'], ['strategy.mu='])
    """
    *before, current = _words(line)
    typed = " ".join(before[1:])
    command = next(
        (name for name in sorted(MODULES, key=len, reverse=True) if f"{typed} ".startswith(f"{name} ")), None
    )
    if command is None:
        prefix = f"{typed} ".lstrip()
        words = {name.removeprefix(prefix).partition(" ")[0] for name in MODULES if name.startswith(prefix)}
    else:
        words = set(_settings(before, current)) if command in WITH_SETTINGS else set()
    return sorted(word for word in words if word.startswith(current))


def _words(line: str) -> list[str]:
    try:
        words = shlex.split(line)
    except ValueError:  # an open quotation mark
        words = line.split()
    return [*words, ""] if not words or line.endswith(" ") else words


def _settings(before: Sequence[str], current: str) -> Iterator[str]:
    """Yield options of the group of the current word, or all groups and settings."""
    setting, has_value, _ = current.partition("=")
    if has_value:
        options = VALUES.get(setting) or tuple(path.stem for path in (CONF_DIR / setting).glob("*.yaml"))
        yield from (f"{setting}={option}" for option in options)
        return
    yield from (f"{name}=" for name in GROUPS)
    yield from (f"{name}=" for name in _flat(installed_settings()) if name.partition(".")[0] not in GROUPS)
    for group, option in _chosen(before).items():
        yield from (f"{group}.{key}=" for key in _keys_of(group, option))


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _chosen(before: Sequence[str]) -> dict[str, str]:
    """Return the option of each group: the typed option, or the default of ``conf/config.yaml``."""
    content = yaml.load((CONF_DIR / "config.yaml").read_text(encoding="utf-8"), Loader=LOADER)
    defaults = {key: value for entry in content["defaults"] if isinstance(entry, dict) for key, value in entry.items()}
    typed = dict(word.partition("=")[::2] for word in before if "=" in word)
    return {group: str(typed.get(group, defaults.get(group))) for group in GROUPS}


def _keys_of(group: str, option: str) -> list[str]:
    path = CONF_DIR / group / f"{option}.yaml"
    content = yaml.load(path.read_text(encoding="utf-8"), Loader=LOADER) if path.is_file() else None
    node = content.get(group, content) if isinstance(content, dict) else {}
    return [key for key in node if key not in ("_target_", "defaults")] if isinstance(node, dict) else []


if __name__ == "__main__":
    sys.exit(main())
