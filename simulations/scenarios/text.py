"""The scenario `text`: fine-tune a pretrained model on texts of the user.

Shapes: N texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any

from fedlearn.data.partition import Partition, as_partition
from fedlearn.data.preprocessing import Preprocessing
from fedlearn.errors import did_you_mean, require
from fedlearn.loop.local_defaults import LocalDefaults, declares_local_defaults
from fedlearn.loop.scenario import Network, Scenario, declares_model
from fedlearn.trainers.pretrained import PretrainedModel
from simulations.scenarios.causal_folder import CausalSettings, causal_folder, declared_causal_model
from simulations.scenarios.folder import declared_model, folder, read_path
from simulations.scenarios.text_columns import classification_columns

CLASSIFICATION, TOKENS, CAUSAL = "classification", "token_classification", "causal_lm"
TASKS = (CLASSIFICATION, TOKENS, CAUSAL)
LENGTH = 128  # subwords of a text


def text_defaults(settings: Mapping[str, Any]) -> LocalDefaults:
    """Return the defaults of local training for the kind of fine-tuning."""
    model = settings.get("model")
    adapter = str(model.get("adapter", "lora")) if isinstance(model, Mapping) else "lora"
    rate = {"lora": 0.001, "head": 0.01}.get(adapter, 0.00005)
    kinds = {"lora": "adapters of a pretrained model", "head": "the head of a pretrained model"}
    return LocalDefaults(
        optimizer="adamw",
        learning_rates={"sgd": 0.1, "adam": rate, "adamw": rate},
        max_grad_norm=1.0,
        reason=kinds.get(adapter, "a pretrained model"),
    )


def declared_text_model(settings: Mapping[str, Any]) -> tuple[Preprocessing, Network] | None:
    """Return inputs, target and network that the settings alone determine, as at a coordinator without data."""
    if settings.get("task") == CAUSAL:
        text = settings.get("text")
        return declared_causal_model({**settings, "text": text if isinstance(text, str) or not text else text[0]})
    task = TOKENS if settings.get("task") == TOKENS else None
    return declared_model({**settings, "task": task, "text_length": settings.get("length")})


@declares_local_defaults(text_defaults)
@declares_model(declared_text_model)
def text(
    *,
    framework: str = "torch",
    model: Any = None,
    partition: Partition | str = "natural",
    path: str | PathLike[str] | None = None,
    task: str = CLASSIFICATION,
    text: str | Sequence[str] | None = None,
    target: str | None = None,
    prompt: str | None = None,
    context: str | None = None,
    response: str | None = None,
    messages: str | None = None,
    classes: Sequence[Any] | None = None,
    client: str | None = None,
    clients: Sequence[Any] | None = None,
    length: int = LENGTH,
    split: str | None = None,
    validation: str | None = None,
    group: str | None = None,
    seed: int = 1,
    device: str = "cpu",
    deployed: bool = False,
) -> Scenario:
    """Train a pretrained model on texts of the user: CSV, TSV, Parquet or JSON Lines, or a data set of the Hub.

    Names of files and folders, or the column ``client``, determine the clients as in the scenario `folder`. Columns
    that no setting names are guessed from usual names, and the header shows them. A real node guesses nothing.

    - ``task=classification``: the columns ``text`` and ``target``.
    - ``task=token_classification``: CoNLL files with a token and its tag per line; or JSON Lines with the
      lists ``tokens`` and ``tags`` (also ``words``; ``ner_tags``, ``pos_tags`` or ``labels``).
    - ``task=causal_lm``: the column ``text``; or ``prompt``, perhaps ``context``, and ``response``; or ``messages``, a
      list of objects with ``role`` and ``content``. The loss counts the responses only. Chats and prompts use the chat
      template of the model, if it has one.

    Args:
        framework: ``torch``, ``jax`` or ``mixed`` (even clients in torch, odd ones in JAX).
        model: a `fedlearn.trainers.pretrained.PretrainedModel`, which is ``model=hf`` with ``model.path``.
        partition: ``natural`` (the clients in the data) or another kind; defaults: 10 clients, test share 0.25.
        path: a file, a folder, or ``hf://owner/name``.
        task: ``classification``, ``token_classification`` or ``causal_lm``.
        text: column of texts, or columns, which are joined.
        target: column with the class of each text.
        prompt: column of prompts or instructions.
        context: column with further input of a prompt.
        response: column of responses.
        messages: column of chats.
        classes: all values of the target, in the order of their numbers; None takes the values in the data.
        client: column with the client of each row; None uses the names of files and folders.
        clients: names of all clients, in the order of their numbers; None takes the names in the data, sorted.
        length: subwords of a text; longer texts are cut, and the header shows their number.
        split: column with the part of each row: ``train``, ``validation`` or ``test``.
        validation: use of the rows of a validation split: ``train``, ``test`` or ``none``.
        group: column with the group of each row; all rows of a group are in one part of the split.
        seed: seed of the partition and of the test split.
        device: device for training, e.g. ``cpu`` or ``cuda``.
        deployed: True at a real node; the node sets it.

    Raises:
        SettingError: a setting is out of range, missing, or does not fit the model.
        DataError: the data or the model cannot be read.
        MissingExtra: transformers, peft or a reader of files is not installed.
    """
    guess = did_you_mean(str(task), TASKS) or CLASSIFICATION
    require(task in TASKS, "task", task, f"one of {', '.join(TASKS)}", f"task={guess}")
    require(path is not None, "path", path, "a CSV, Parquet or JSON Lines file, or a folder", "path=my_texts")
    expected = "a pretrained model"
    require(isinstance(model, PretrainedModel), "model", model, expected, "model=hf model.path=my_model")
    partition = as_partition(partition)
    shared: dict[str, Any] = {"framework": framework, "device": device, "seed": seed}
    causal_columns = {"prompt": prompt, "context": context, "response": response, "messages": messages}
    if task == CAUSAL:
        _require_unused(task, target=target, classes=classes)
        settings = CausalSettings(
            columns={"text": _single(text), **causal_columns},
            client=client,
            clients=clients,
            length=length,
            split=split,
            validation=validation,
            group=group,
            deployed=deployed,
        )
        return causal_folder(str(path), settings, partition, model=model, **shared)
    _require_unused(task, **causal_columns)
    options: dict[str, Any] = {
        **shared,
        "model": model,
        "partition": partition,
        "path": path,
        "classes": classes,
        "client": client,
        "clients": clients,
        "text_length": length,
        "split": split,
        "validation": validation,
        "group": group,
        "deployed": deployed,
    }
    if task == TOKENS:
        _require_unused(task, text=text, target=target)
        return replace(folder(task=TOKENS, **options), name="text")
    text, target, note = classification_columns(
        text, target, lambda: read_path(str(path), client), others=(client, split, group), deployed=deployed
    )
    scenario = folder(text=text, target=target, **options)
    source = " · ".join(filter(None, (scenario.data.source, note)))
    return replace(scenario, name="text", data=replace(scenario.data, source=source))


def _require_unused(task: str, **columns: Any) -> None:
    for name, value in columns.items():
        require(value is None, name, value, f"null for task={task}", f"{name}=null")


def _single(text: str | Sequence[str] | None) -> str | None:
    names = [text] if isinstance(text, str) else list(text or ())
    require(len(names) <= 1, "text", text, "one column for task=causal_lm", "text=text")
    return names[0] if names else None
