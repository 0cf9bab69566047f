"""``python -m simulations.sample RUN``: text that a run's model writes, one character after another."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedlearn import checkpoint
from fedlearn.config import build
from fedlearn.errors import SettingError, is_count, is_number, require
from fedlearn.scenario import Scenario
from fedlearn.seeds import Purpose, generator
from simulations.exits import DONE, exit_code
from simulations.interrupt import terminate_as_interrupt
from simulations.recipe import read_recipe
from simulations.rounds import CHECKPOINTS
from simulations.run import set_environment
from simulations.scenarios.shakespeare import ALPHABET, encode

WRITES = "shakespeare"  # the scenario whose models write


def main(words: Sequence[str] | None = None) -> int:
    """Do what the command line says; exit codes as those of ``simulations.run``."""
    args = arguments().parse_args(words)
    terminate_as_interrupt()

    def act() -> int:
        sys.stdout.write(sample(args.run, start=args.start, length=args.length, temperature=args.temperature) + "\n")
        return DONE

    return exit_code(act)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m simulations.sample", description=__doc__)
    parser.add_argument("run", type=Path, help="the folder of a run of scenario=shakespeare")
    parser.add_argument("--start", default="O ", help="what the text begins with (%(default)r)")
    parser.add_argument("--length", type=int, default=300, help="characters to write (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.6, help="0 always takes the likeliest (%(default)s)")
    return parser


def sample(run: Path, *, start: str, length: int, temperature: float) -> str:
    """What the model of a run's newest checkpoint writes; the same for the same arguments.

    Raises:
        FedlearnError: the folder holds no run of such a scenario, its data are gone, or an argument is out of range.
    """
    require(is_count(length), "--length", length, "a whole number >= 1", "--length 300")
    require(bool(start), "--start", repr(start), "one character or more", "--start O")
    require(is_number(temperature, at_least=0), "--temperature", temperature, "a number >= 0", "--temperature 0.6")
    cfg = read_recipe(run)
    set_environment(cfg)
    scenario: Scenario = build(cfg.scenario, "scenario", allow=cfg.get("allow_targets") or [])
    if scenario.name != WRITES:
        raise SettingError("the run's scenario", scenario.name, WRITES, f"a run of scenario={WRITES}")
    state, _, _ = checkpoint.newest(run / CHECKPOINTS, scenario.trainer.layout)
    rng, text = generator(state.seed, Purpose.EVALUATE), start
    window = int(cfg.scenario.length)
    for _ in range(length):
        tokens_T = encode(text[-window:])
        x = np.zeros((1, window), np.int32)
        x[0, : len(tokens_T)] = tokens_T
        logits_C = scenario.trainer.predict(state.params_D, x)[0, len(tokens_T) - 1].astype(np.float64)
        text += ALPHABET[_drawn(logits_C[1:], temperature, rng)]
    return text


def _drawn(logits_C: np.ndarray, temperature: float, rng: np.random.Generator) -> int:
    if temperature == 0:
        return int(logits_C.argmax())
    p_C = np.exp((logits_C - logits_C.max()) / temperature)
    return int(rng.choice(len(p_C), p=p_C / p_C.sum()))


if __name__ == "__main__":
    sys.exit(main())
