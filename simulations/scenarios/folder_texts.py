"""Choose the inputs and the model for columns of text.

The inputs are hashed words, hashed tokens in order for a text model, or the subwords of a pretrained model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedlearn.core.federated_data import FederatedData
from fedlearn.data.base_tokenizer import missing_tokenizer
from fedlearn.data.column_types import HashedText
from fedlearn.data.inputs import TableInputs, TextColumnInputs
from fedlearn.data.subword_tokenizer import SubwordTokenizer, load_tokenizer
from fedlearn.data.tables import Table
from fedlearn.data.text_tokenizers import HashingTokenizer
from fedlearn.errors import require
from fedlearn.loop.protocols import Trainer
from fedlearn.loop.scenario import Network
from fedlearn.trainers.pretrained import PretrainedModel, build_pretrained, declared_network, pretrained_network
from simulations.models import build_trainer, network_of
from simulations.models.text import TEXT_CLASSIFIERS, build_text_classifier

NUM_TEXT_FEATURES = 4096  # hashed words of a text; hashing needs no common vocabulary
VOCAB_SIZE = 8192  # hashed tokens of a text model
LENGTH = 128  # tokens of a text


def text_inputs(columns: Sequence[str], model: Any, length: int = LENGTH) -> tuple[TableInputs | TextColumnInputs, str]:
    """Return the inputs of columns of text, and their description for the header.

    Args:
        columns: names of the columns.
        model: name or module of the model, or a pretrained model. A text model reads tokens in order, and other models
            count words.
        length: tokens of a text for a text model; longer texts are cut.
    """
    shown = " and ".join(columns)
    if isinstance(model, PretrainedModel):
        subwords = load_tokenizer(model.find().folder, length=length)
        return TextColumnInputs(columns=tuple(columns), tokenizer=subwords), f"first {length} subwords of {shown}"
    if not is_text_model(model):
        hashed = tuple(HashedText(name=name, num_features=NUM_TEXT_FEATURES) for name in columns)
        return TableInputs(columns=hashed), f"words of {shown}, hashed"
    tokenizer = HashingTokenizer(vocab_size=VOCAB_SIZE, length=length)
    return TextColumnInputs(columns=tuple(columns), tokenizer=tokenizer), f"first {length} tokens of {shown}, hashed"


def declared_text_inputs(columns: Sequence[str], model: Any, length: int) -> TableInputs | TextColumnInputs:
    """Return the inputs of columns of text without a look at files, because a message must not choose a folder."""
    if is_pretrained(model):
        return TextColumnInputs(columns=tuple(columns), tokenizer=missing_tokenizer(length))
    return text_inputs(columns, model, length)[0]


def declared_network_for(inputs: TableInputs | TextColumnInputs, model: Any) -> Network:
    """Return the description of the network without a look at files; see `declared_text_inputs`."""
    if is_pretrained(model) and isinstance(inputs, TextColumnInputs):
        return declared_network(inputs.tokenizer.length)
    return network_for(inputs)


def cut_note(inputs: Any, table: Table) -> str:
    """Return the number of texts that are cut, for the header; empty if there is none."""
    if not isinstance(inputs, TextColumnInputs) or not isinstance(inputs.tokenizer, SubwordTokenizer):
        return ""
    num_cut = inputs.tokenizer.count_cut(inputs.texts(table))
    return f"{num_cut} of {len(table)} texts are cut to {inputs.tokenizer.length} subwords" if num_cut else ""


def is_pretrained(model: Any) -> bool:
    """Return whether a model, or the settings of a model, are of a pretrained model."""
    name = f"{PretrainedModel.__module__}.{PretrainedModel.__name__}"
    return isinstance(model, PretrainedModel) or (isinstance(model, Mapping) and model.get("_target_") == name)


def is_text_model(model: Any) -> bool:
    """Return whether a model reads tokens in order."""
    return isinstance(model, str) and model in TEXT_CLASSIFIERS


def network_for(inputs: Any, model: Any = None) -> Network:
    """Return the description of the network for some inputs, to build it again without data."""
    if isinstance(model, PretrainedModel):
        return pretrained_network(model.find(), length=inputs.tokenizer.length)
    if isinstance(inputs, TextColumnInputs):
        name = f"{build_text_classifier.__module__}.{build_text_classifier.__name__}"
        return Network(builder=name, arguments=_sizes(inputs))
    return network_of(input_shape=inputs.input_shape, hidden=(32,))


def trainer_for(inputs: Any, model: Any, data: FederatedData, **backend: Any) -> tuple[Trainer, str]:
    """Return the trainer of a model for some inputs, and its description in one line.

    Raises:
        SettingError: the model does not fit the inputs.
    """
    if isinstance(model, PretrainedModel):
        reads_text = isinstance(inputs, TextColumnInputs) and isinstance(inputs.tokenizer, SubwordTokenizer)
        expected = "another model: a pretrained model reads texts, and scenario.text is null"
        require(reads_text, "model", "hf", expected, "scenario.text=review")
        return build_pretrained(model, data, length=inputs.tokenizer.length, **backend)
    if isinstance(inputs, TextColumnInputs):
        sizes = _sizes(inputs)
        return build_text_classifier(model, data, vocab_size=sizes["vocab_size"], length=sizes["length"], **backend)
    return build_trainer(model, data, input_shape=inputs.input_shape, hidden=(32,), **backend)


def _sizes(inputs: TextColumnInputs) -> dict[str, int]:
    assert isinstance(inputs.tokenizer, HashingTokenizer)
    return {"vocab_size": inputs.tokenizer.vocab_size, "length": inputs.tokenizer.length}
