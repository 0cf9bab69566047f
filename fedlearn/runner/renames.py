"""Map old names of settings and commands to new names. This module imports no other library."""

from __future__ import annotations

import sys
from collections.abc import Mapping

RENAMED: Mapping[str, str] = {  # old -> new name of a group, a setting or a command
    "attack": "poisoning",
    "attack.clip": "privacy_attack.clip",
    "attack.label_noise": "privacy_attack.label_noise",
    "attack.members": "privacy_attack.members",
    "attack.noise": "privacy_attack.noise",
    "attack.shadows": "privacy_attack.shadows",
    "attack.victims": "privacy_attack.victims",
    "engine.enough": "engine.min_completed",
    "engine.nodes": "min_sites",
    "engine.num_nodes": "min_sites",
    "fedlearn.deploy.local": "fedlearn.deploy.rehearse",
    "scenario.alpha": "partition.alpha",
    "scenario.classes_per_client": "partition.classes_per_client",
    "scenario.dropout": "model.dropout",
    "scenario.encoder": "model.path",
    "scenario.layers": "model.layers",
    "scenario.lora_alpha": "model.alpha",
    "scenario.lora_on": "model.targets",
    "scenario.lora_rank": "model.rank",
    "scenario.model": "model",
    "scenario.num_clients": "partition.num_clients",
    "scenario.partition": "partition",
    "scenario.strictness": "partition.strictness",
    "scenario.test_share": "partition.test_share",
    "scenario.tuning": "model.adapter",
    "simulations.attack": "simulations.privacy_attack",
    "simulations.sample": "simulations.generate",
    "strategy.candidates": "strategy.num_candidates",
    "strategy.keeps": "strategy.personal_parameters",
    "strategy.least": "strategy.min_exploration",
    "strategy.root_examples": "strategy.num_root_examples",
    "system.enough": "system.min_completed",
}


def new_name(name: str) -> str | None:
    """Return the new name of a renamed group, setting or command. Return None for all other names.

    >>> new_name("system.enough"), new_name("attack.fraction"), new_name("rounds")
    ('system.min_completed', 'poisoning.fraction', None)
    """
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if new := RENAMED.get(".".join(parts[:end])):
            return ".".join([new, *parts[end:]])
    return None


def refuse_renamed_command(name: str) -> int:
    """Print the new name of a renamed command, and return 2, the exit code of a wrong command line."""
    sys.stderr.write(f"{name} is not a command\n  did you mean python -m {new_name(name)}?\n")
    return 2
