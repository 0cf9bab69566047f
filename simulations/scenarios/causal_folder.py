"""Read texts, prompts with responses, or chats, for a causal language model.

Shapes: N texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedlearn.data.base_tokenizer import FORMS, missing_tokenizer
from fedlearn.data.digests import digests_of_table
from fedlearn.data.from_arrays import from_rows
from fedlearn.data.partition import Natural, Partition
from fedlearn.data.preprocessing import Preprocessing, Target
from fedlearn.data.prompt_inputs import PromptInputs, prompt_inputs
from fedlearn.data.row_splits import SplitSettings, held_out_table, split_contents
from fedlearn.data.subword_tokenizer import IGNORED, LABELS
from fedlearn.errors import DataError
from fedlearn.loop.scenario import Network, Scenario
from fedlearn.trainers.pretrained import (
    CAUSAL,
    PretrainedModel,
    build_pretrained,
    declared_network,
    pretrained_network,
)
from simulations.scenarios.folder import owners_of, read_path, rows_of
from simulations.scenarios.text_columns import causal_columns


@dataclass(frozen=True, kw_only=True)
class CausalSettings:
    """Hold the settings of texts for a causal language model; see `simulations.scenarios.text.text`."""

    columns: Mapping[str, str | None] = field(default_factory=dict)
    client: str | None = None
    clients: Sequence[Any] | None = None
    length: int = 128
    split: str | None = None
    validation: str | None = None
    group: str | None = None
    deployed: bool = False


def causal_folder(
    path: str,
    settings: CausalSettings,
    partition: Partition,
    *,
    model: PretrainedModel,
    framework: str,
    device: str,
    seed: int,
) -> Scenario:
    """Build a scenario for a causal language model.

    Args:
        path: file, folder or data set of the Hub.
        settings: columns and clients.
        partition: partition of the texts over the clients.
        model: settings of the model.
        framework: see `fedlearn.trainers.pretrained.build_pretrained`.
        device: see `fedlearn.trainers.pretrained.build_pretrained`.
        seed: seed of the partition and of the test split.

    Raises:
        SettingError: a setting does not fit the data.
        DataError: the data or the model cannot be read.
    """
    files = model.find()
    contents = read_path(path, settings.client)
    columns, note = causal_columns(settings.columns, contents.table, deployed=settings.deployed)
    inputs = prompt_inputs(files.folder, length=settings.length, **columns)
    x = inputs.transform(contents.table)
    y_N = (x[LABELS][:, 1:] != IGNORED).sum(axis=1)
    has_tokens = bool(y_N.any()) or settings.deployed
    if not has_tokens:
        fix = f"scenario.length={2 * settings.length}"
        raise DataError(f"{path}: no text has a token that the loss counts, after the cut\n  try       {fix}")
    names, natural_N = owners_of(contents, settings.clients)
    rows = rows_of(partition, contents, np.zeros(len(y_N)), natural_N, names=names, order_by=None, seed=seed)
    client_names = names if isinstance(partition, Natural) else ()
    split = SplitSettings(split_column=settings.split, group_column=settings.group, validation=settings.validation)
    options: dict[str, Any] = {"test_share": partition.held_out_share, "seed": seed}
    parts = split_contents(contents, rows, np.zeros(len(y_N)), split, names=client_names, **options)
    cut = inputs.count_cut(contents.table)
    notes = (*contents.notes, *parts.notes, note, *_cut_notes(*cut, len(y_N), settings.length))
    data = replace(
        from_rows(x, y_N, train=parts.train, test=parts.test, task=CAUSAL),
        names=dict(enumerate(client_names)),
        source=" · ".join(filter(None, (Path(path).name, *notes, f"first {settings.length} subwords"))),
    )
    data = data if settings.deployed else data.hold_out(parts.held_out_clients)
    build: dict[str, Any] = {"framework": framework, "device": device}
    trainer, line = build_pretrained(model, data, length=settings.length, digest=files.digest, **build)
    return Scenario(
        name="text",
        data=data,
        trainer=trainer,
        model=line,
        partition=str(partition),
        preprocessing=Preprocessing(inputs=inputs, target=Target(name="text", task=CAUSAL)),
        network=pretrained_network(files, length=settings.length),
        base_digest=files.digest,
        data_digests=digests_of_table(contents.table),
        held_out_table=held_out_table(contents.table, parts.test, client_names),
    )


def declared_causal_model(settings: Mapping[str, Any]) -> tuple[Preprocessing, Network] | None:
    """Return inputs, target and network that the settings alone determine; None without columns."""
    columns = {name: settings[name] for name in FORMS if settings.get(name)}
    if not columns:
        return None
    length = settings.get("length") or CausalSettings.length
    inputs = PromptInputs(tokenizer=missing_tokenizer(length), **columns)
    return Preprocessing(inputs=inputs, target=Target(name="text", task=CAUSAL)), declared_network(length)


def _cut_notes(num_cut: int, num_empty: int, num_texts: int, length: int) -> tuple[str, ...]:
    cut = f"{num_cut} of {num_texts} texts are cut to {length} subwords" if num_cut else ""
    empty = f"{num_empty} texts have no counted token" if num_empty else ""
    return tuple(filter(None, (cut, empty)))
