"""Read sentences with a tag per token, for token classification with the scenario `folder`.

The path is a CoNLL file or JSON Lines (`fedlearn.data.token_files`), or a folder of them. The names of folders and
files determine clients and split, as for tables (`fedlearn.data.folder`).

Shapes: N sentences, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedlearn.core.tasks.dense import PADDING, entity_f1, has_entities
from fedlearn.data.base_tokenizer import missing_tokenizer
from fedlearn.data.contents import Contents, mask_or_none
from fedlearn.data.folder_layout import list_files
from fedlearn.data.from_arrays import from_rows
from fedlearn.data.levels import to_category
from fedlearn.data.partition import Natural, Partition, partition_rows
from fedlearn.data.preprocessing import Preprocessing, Target
from fedlearn.data.row_splits import SplitSettings, split_contents
from fedlearn.data.split_names import TEST, VALIDATION
from fedlearn.data.subword_tokenizer import load_tokenizer
from fedlearn.data.table_places import table_places
from fedlearn.data.tables import Table
from fedlearn.data.token_files import Sentence, is_token_file, read_sentences
from fedlearn.data.token_inputs import SubwordTokenInputs, TokenInputs, are_tokens
from fedlearn.errors import DataError, require
from fedlearn.loop.scenario import Network, Scenario
from fedlearn.trainers.pretrained import PretrainedModel, build_pretrained, declared_network
from simulations.models.text import build_tagger
from simulations.models.text.readers import digest_of_base
from simulations.scenarios.folder_texts import LENGTH, is_pretrained, network_for

TASK = "token_classification"
MAX_TAGS = 1000  # more tags are a column of another kind, e.g. lemmas
CLASSES_FIX = "'scenario.classes=[O,B-PER,I-PER]'"


@dataclass(frozen=True, kw_only=True)
class TokenSettings:
    """Hold the settings of a folder of sentences.

    Args:
        classes: tags in the order of their numbers; None takes the tags in the files, sorted.
        clients: names of all clients in the order of their numbers; None takes the names of files and folders.
        length: tokens of a sentence; longer sentences are cut.
        layout: meaning of each folder, see `fedlearn.data.table_places.table_places`; None infers it.
        split: use of validation files, and clients that never train.
        columns: values of settings that name columns of a table; they are refused.
        has_all_clients: False at a real node, which needs ``classes``.
    """

    classes: Sequence[Any] | None = None
    clients: Sequence[Any] | None = None
    length: int = 128
    layout: str | None = None
    split: SplitSettings = field(default_factory=SplitSettings)
    columns: Mapping[str, Any] = field(default_factory=dict)
    has_all_clients: bool = True


def declared_tagger(settings: Mapping[str, Any]) -> tuple[Preprocessing, Network] | None:
    """Return inputs, target and network that the settings alone determine; None without ``classes``."""
    if not settings.get("classes"):
        return None
    target = _target(map(to_category, settings["classes"]))
    if is_pretrained(settings.get("model")):
        length = settings.get("text_length") or LENGTH
        inputs = SubwordTokenInputs(tokenizer=missing_tokenizer(length))
        return Preprocessing(inputs=inputs, target=target), declared_network(length)
    tokens = TokenInputs(length=settings.get("text_length") or TokenInputs.length)
    return Preprocessing(inputs=tokens, target=target), _network(tokens)


def token_folder(
    path: Path, settings: TokenSettings, partition: Partition, *, model: Any, framework: str, device: str, seed: int
) -> Scenario:
    """Build a scenario for token classification from CoNLL files.

    Args:
        path: file or folder.
        settings: settings of the folder.
        partition: partition of the sentences over the clients.
        model: ``gru``, ``bilstm``, or a module.
        framework: see `simulations.models.text.build_tagger`.
        device: see `simulations.models.text.build_tagger`.
        seed: seed of the partition and of the test split.

    Raises:
        SettingError: a setting does not fit the files.
        DataError: a file cannot be read; the message names the file and the line.
    """
    for name, value in settings.columns.items():
        require(not value, name, value, "null, because sentences with tags have no such columns", f"{name}=null")
    inputs = _inputs(model, settings.length)
    files = _files(path)
    sentences_by_file = [list(read_sentences(file)) for file in files]
    tags = _tags(sentences_by_file, settings)
    contents = _contents(path, files, sentences_by_file, settings.layout)
    sentences = [sentence for part in sentences_by_file for sentence in part]
    x_NT = inputs.transform([sentence.tokens for sentence in sentences], cut=True)
    y_NT = np.concatenate(
        [_targets(file, part, tags, inputs.length) for file, part in zip(files, sentences_by_file, strict=True)]
    )
    y_NT[~are_tokens(x_NT)] = PADDING  # tokens after the cut
    strata_N = np.zeros(len(sentences), np.int64)
    names, rows = _rows(contents, settings.clients, partition, strata_N, seed)
    options: dict[str, Any] = {"names": names, "test_share": partition.held_out_share, "seed": seed}
    parts = split_contents(contents, rows, strata_N, settings.split, **options)
    metrics = [entity_f1(tags)] if settings.has_all_clients and has_entities(tags) else []
    num_cut = sum(len(s.tokens) for s in sentences) - int(are_tokens(x_NT).sum())
    notes = (*contents.notes, *parts.notes, *_cut_note(sentences, num_cut, inputs))
    data = replace(
        from_rows(x_NT, y_NT, train=parts.train, test=parts.test, task=TASK, metrics=metrics),
        num_classes=len(tags),
        names=dict(enumerate(names)),
        source=" · ".join((path.name, *notes)),
    )
    data = data.hold_out(parts.held_out_clients) if settings.has_all_clients else data
    build: dict[str, Any] = {"length": inputs.length, "framework": framework, "device": device}
    if isinstance(inputs, TokenInputs):
        trainer, line = build_tagger(model, data, vocab_size=inputs.vocab_size, **build)
    else:
        trainer, line = build_pretrained(model, data, **build)
    return Scenario(
        name="folder",
        data=data,
        trainer=trainer,
        model=line,
        partition=str(partition),
        preprocessing=Preprocessing(inputs=inputs, target=_target(tags)),
        network=_network(inputs) if isinstance(inputs, TokenInputs) else network_for(inputs, model),
        base_digest=digest_of_base(model),
    )


def _inputs(model: Any, length: int) -> TokenInputs | SubwordTokenInputs:
    if isinstance(model, PretrainedModel):
        return SubwordTokenInputs(tokenizer=load_tokenizer(model.find().folder, length=length))
    return TokenInputs(length=length)


def _target(tags: Any) -> Target:
    return Target(name="tag", task=TASK, classes=tuple(tags))


def _network(inputs: TokenInputs) -> Network:
    name = f"{build_tagger.__module__}.{build_tagger.__name__}"
    return Network(builder=name, arguments={"vocab_size": inputs.vocab_size, "length": inputs.length})


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise DataError(f"scenario.path is {path}: no such file or folder\n  advice    an absolute path")
    if path.is_file() and path.name.lower().endswith((".csv", ".csv.gz", ".parquet")):
        expected = "a CoNLL file: a token and its tag per line, and an empty line between sentences"
        advice = "save the sentences as sentences.conll or sentences.jsonl"
        raise DataError(f"{path} is a table\n  expected  {expected}\n  advice    {advice}")
    files = [path] if path.is_file() else [file for file in list_files(path) if is_token_file(file)]
    if not files:
        raise DataError(
            f"{path} has no CoNLL file and no JSON Lines\n  advice    a file north.conll or north.jsonl for each client"
        )
    return files


def _tags(sentences_by_file: Sequence[Sequence[Sentence]], settings: TokenSettings) -> tuple[str, ...]:
    """Return the tags in the order of their numbers."""
    stated = settings.classes
    expected = "all tags in order, because this folder lacks some clients"
    require(stated is not None or settings.has_all_clients, "classes", stated, expected, CLASSES_FIX)
    if stated is None:
        tags = tuple(sorted({tag for part in sentences_by_file for sentence in part for tag in sentence.tags}))
    else:
        tags = tuple(map(to_category, stated))
    is_list = 2 <= len(tags) <= MAX_TAGS and len(set(tags)) == len(tags)
    require(is_list, "classes", f"{len(tags)} tags", f"2 to {MAX_TAGS} different tags", CLASSES_FIX)
    return tags


def _targets(file: Path, sentences: Sequence[Sentence], tags: Sequence[str], length: int) -> np.ndarray:
    """Return the number of the tag of each token, ``(N, T)``, and -1 for padding."""
    numbers = {tag: number for number, tag in enumerate(tags)}
    y_NT = np.full((len(sentences), length), PADDING, np.int64)
    for row_T, sentence in zip(y_NT, sentences, strict=True):
        found = [numbers.get(tag, PADDING) for tag in sentence.tags]
        if PADDING in found:
            line = sentence.line_of(found.index(PADDING))
            problem = f"{file}, line {line}, has a tag that is not in scenario.classes"
            raise DataError(f"{problem}\n  expected  one of {len(tags)} tags\n  advice    {CLASSES_FIX} with all tags")
        row_T[: len(found)] = found[:length]
    return y_NT


def _contents(
    path: Path, files: Sequence[Path], sentences_by_file: Sequence[Sequence[Sentence]], layout: str | None
) -> Contents:
    """Return a row for each sentence, with client and split from the names of folders and files."""
    folder = path.parent if path.is_file() else path
    as_tables = [file.with_suffix(".csv") for file in files]  # `table_places` knows the suffixes of tables only
    places = table_places(folder, as_tables, layout="*" if path.is_file() else layout)
    clients = [client for client, _ in places]
    if any(clients) and not all(clients):
        unassigned = files[clients.index("")].name
        problem = f"{unassigned} names no client, but other files do"
        raise DataError(f"{problem}\n  advice    a folder per client, or scenario.layout=client")
    sizes = [len(part) for part in sentences_by_file]
    splits_N = np.repeat(np.array([split or "" for _, split in places], object), sizes)
    origins = tuple((str(file.relative_to(folder)), 1, size) for file, size in zip(files, sizes, strict=True))
    note = f"splits from names of files ({', '.join(sorted({split for _, split in places if split}))})"
    return Contents(
        table=Table({}, origins),
        clients=np.repeat(np.array(clients, object), sizes) if any(clients) else None,
        test_N=mask_or_none(splits_N == TEST),
        validation_N=mask_or_none(splits_N == VALIDATION),
        notes=(note,) if (splits_N != "").any() else (),
    )


def _rows(
    contents: Contents, stated: Sequence[Any] | None, partition: Partition, strata_N: np.ndarray, seed: int
) -> tuple[tuple[str, ...], list[np.ndarray]]:
    """Return the names of the clients, and the sentences of each client. Other partitions have no names."""
    found = sorted(set(() if contents.clients is None else contents.clients.tolist()))
    names = tuple(found) if stated is None else tuple(map(to_category, stated))
    unknown = next((name for name in found if name not in names), None)
    expected, fix = f"all clients of the folder, including {unknown}", "'scenario.clients=[north,south]'"
    require(unknown is None, "clients", list(names), expected, fix)
    has_clients = contents.clients is not None
    require(has_clients or stated is None, "clients", stated, "null, because no file names a client", "clients=null")
    number_of = {name: number for number, name in enumerate(names)}
    natural_N = None if contents.clients is None else np.array([number_of[name] for name in contents.clients])
    if not isinstance(partition, Natural):
        return (), partition_rows(partition, strata_N, natural_N, seed=seed)
    if natural_N is None:
        require(False, "partition", partition, "iid, because no file names a client", "partition=iid")
    partition.require_num_clients(len(names))
    return names, [np.flatnonzero(natural_N == number) for number in range(len(names))]


def _cut_note(sentences: Sequence[Sentence], num_cut: int, inputs: TokenInputs | SubwordTokenInputs) -> tuple[str, ...]:
    if isinstance(inputs, SubwordTokenInputs):
        cut = (f"{num_cut} tokens after the cut have no tag",) if num_cut else ()
        return (*cut, f"first {inputs.length} subwords of a sentence")
    too_long = sum(len(sentence.tokens) > inputs.length for sentence in sentences)
    cut = (f"{too_long} of {len(sentences)} sentences are cut to {inputs.length} tokens",) if too_long else ()
    return (*cut, f"first {inputs.length} tokens of a sentence, hashed")
