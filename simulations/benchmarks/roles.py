"""``python -m simulations.benchmarks.roles``: write roles of Shakespeare and a decoder pretrained on other plays.

A decoder of the Hub has read Shakespeare. This decoder has not read the plays of the roles, so a held-out text is new.
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path

from fedlearn.core.command_line import DONE, command_parser, run_command
from fedlearn.runner.environment import set_environment
from simulations.datasets.shakespeare import read_roles

PLAYS = ("coriolanus", "king-lear", "much-ado-about-nothing", "twelfth-night")
TEST_SHARE = 0.2  # share of the texts of a role that are held out: the last ones


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return the exit code."""
    about = f"Write roles of {len(PLAYS)} plays as a CSV file, and a decoder pretrained on the other plays."
    parser = command_parser("simulations.benchmarks.roles", about)
    parser.add_argument("--out", default="roles", help="new folder with roles.csv and decoder (default roles)")
    parser.add_argument("--path", default=None, help="folder with the plays or roles; default: search for them")
    parser.add_argument("--roles", type=int, default=3, help="longest roles of each play (default 3)")
    parser.add_argument("--characters", type=int, default=16_000, help="characters of a role (default 16,000)")
    parser.add_argument("--width", type=int, default=192, help="features of the decoder (default 192)")
    parser.add_argument("--steps", type=int, default=800, help="steps of pretraining (default 800)")
    return run_command(parser, write, argv)


def write(*, out: str, path: str | None, roles: int, characters: int, width: int, steps: int) -> int:
    """Write the texts and the decoder, and return the exit code."""
    set_environment("torch")
    texts, folder = read_roles(path=path)[0], Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    rows = list(rows_of(longest_roles(texts, roles), characters))
    with (folder / "roles.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("role", "text", "split"), *rows])
    others = "\n\n".join(text for role, text in sorted(texts.items()) if _play(role) not in PLAYS)
    sys.stdout.write(f"{len(rows)} texts of roles · {len(others):,} characters of other plays\n")
    import_module("simulations.benchmarks.roles_torch").pretrain(others, folder / "decoder", width=width, steps=steps)
    return DONE


def longest_roles(texts: Mapping[str, str], number: int) -> dict[str, str]:
    """Return the longest roles of each held-out play."""
    by_play: dict[str, list[str]] = defaultdict(list)
    for role in sorted(texts, key=lambda role: (-len(texts[role]), role)):
        by_play[_play(role)].append(role)
    return {role: texts[role] for play in PLAYS for role in by_play[play][:number]}


def rows_of(texts: Mapping[str, str], characters: int) -> Iterator[tuple[str, str, str]]:
    """Yield role, text and part of the split for the pieces of each role, in their order."""
    for role, text in texts.items():
        parts = list(pieces(text[:characters]))
        num_train = len(parts) - max(1, round(TEST_SHARE * len(parts)))
        for i, part in enumerate(parts):
            yield role, part, "train" if i < num_train else "test"


def pieces(text: str, size: int = 240) -> Iterator[str]:
    """Yield whole lines with at least ``size`` characters together. A shorter rest at the end is omitted."""
    lines: list[str] = []
    for line in text.splitlines():
        lines.append(line)
        if sum(map(len, lines)) >= size:
            yield "\n".join(lines)
            lines = []


def _play(role: str) -> str:
    return role.partition("/")[0]


if __name__ == "__main__":
    sys.exit(main())
