"""Turn texts, prompts with responses, or chats into the inputs of a causal language model.

The loss counts the tokens of responses only. For plain texts it counts all tokens.

Shapes: N texts, T tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fedlearn.data.subword_tokenizer import IGNORED, LABELS, SubwordTokenizer, auto_tokenizer, tokenizer_of_template
from fedlearn.data.tables import Table, missing_column
from fedlearn.errors import DataError

PLAIN_PROMPT = "### Instruction:\n{prompt}\n\n### Response:\n"
PROMPT_WITH_CONTEXT = "### Instruction:\n{prompt}\n\n### Input:\n{context}\n\n### Response:\n"
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
Segment = tuple[str, bool]  # a part of a text, and whether the loss counts it
Message = dict[str, str]  # role and content


@dataclass(frozen=True, kw_only=True)
class PromptInputs:
    """Turn rows of a table into token numbers and labels of a causal language model.

    Exactly one of ``text``, ``prompt`` with ``response``, and ``messages`` names columns. A row of messages is a JSON
    list of objects with ``role`` and ``content``.

    Args:
        tokenizer: tokenizer of the model.
        text: column with plain texts; empty for the other forms.
        prompt: column with prompts or instructions.
        context: column with further input of a prompt; may be empty.
        response: column with responses.
        messages: column with chats.
        chat_template: template of the tokenizer, in Jinja; empty for a model without a template. It runs in a sandbox
            of transformers.
        bos: text of the token before a text; empty for none.
        eos: text of the token after a text or a response; empty for none.
    """

    tokenizer: SubwordTokenizer
    text: str = ""
    prompt: str = ""
    context: str = ""
    response: str = ""
    messages: str = ""
    chat_template: str = ""
    bos: str = ""
    eos: str = ""
    kind: ClassVar[str] = "prompts"

    def __post_init__(self) -> None:
        values = [self.text, self.prompt, self.context, self.response, self.messages, self.chat_template]
        are_texts = all(isinstance(value, str) for value in (*values, self.bos, self.eos))
        num_forms = sum(bool(column) for column in (self.text, self.prompt, self.messages))
        if not isinstance(self.tokenizer, SubwordTokenizer) or not are_texts or num_forms != 1:
            raise ValueError("wrong columns of a language model")
        if bool(self.prompt) != bool(self.response):
            raise ValueError("prompts without responses")

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns in use."""
        return tuple(filter(None, (self.text, self.prompt, self.context, self.response, self.messages)))

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one model input, without the batch axis."""
        return (self.tokenizer.length,)

    def transform(
        self, table: Table, *, allow_unknown: bool = False, allow_missing: bool = False, unknown_fix: str = ""
    ) -> np.ndarray:
        """Return the model inputs ``(N,)`` with token numbers, mask and labels, ``(N, T)`` int32 each.

        Args:
            table: rows, with the columns in any order.
            allow_unknown: without effect.
            allow_missing: whether an absent column of ``context`` counts as empty. Other columns must be present.
            unknown_fix: without effect.

        Raises:
            DataError: a column is absent, or a cell is no list of messages.
        """
        for name in self.columns:
            if name not in table.columns and not (allow_missing and name == self.context):
                raise missing_column(table, name, self.columns, can_be_missing=name == self.context)
        return self.encode([self._segments(table, row) for row in range(len(table))])

    def encode(self, texts: Sequence[Sequence[Segment]]) -> np.ndarray:
        """Return the model inputs of texts in segments."""
        length, ids_N = self.tokenizer.length, []
        labels_NT = np.full((len(texts), length), IGNORED, np.int32)
        for row, segments in enumerate(texts):
            ids, labels = self.tokens(segments)
            ids_N.append(ids[:length])
            labels_NT[row, : len(labels[:length])] = labels[:length]
        return self.tokenizer.inputs_of(ids_N, **{LABELS: labels_NT})

    def tokens(self, segments: Sequence[Segment]) -> tuple[list[int], list[int]]:
        """Return the token numbers of a text, and its labels, without a cut."""
        ids: list[int] = []
        labels: list[int] = []
        for text, is_counted in segments:
            part = self.tokenizer.ids(text)
            ids += part
            labels += part if is_counted else [IGNORED] * len(part)
        return ids, labels

    def count_cut(self, table: Table) -> tuple[int, int]:
        """Return the number of texts that are cut, and the number of texts that lose all counted tokens."""
        length, num_cut, num_empty = self.tokenizer.length, 0, 0
        for row in range(len(table)):
            ids, labels = self.tokens(self._segments(table, row))
            num_cut += len(ids) > length
            num_empty += all(label == IGNORED for label in labels[1:length])
        return num_cut, num_empty

    def segments_of_prompt(self, prompt: str, context: str = "") -> list[Segment]:
        """Return the segments before a response, as in training: for the generation of a response."""
        if self.messages or (self.prompt and self.chat_template):
            content = f"{prompt}\n{context}" if context else prompt
            return [(self._render([{"role": "user", "content": content}], is_open=True), False)]
        if self.prompt:
            template = PROMPT_WITH_CONTEXT if context else PLAIN_PROMPT
            return [(self.bos, False), (template.format(prompt=prompt, context=context), False)]
        return [(self.bos, False), (prompt, False)]

    def _segments(self, table: Table, row: int) -> list[Segment]:
        """Return the segments of a row."""

        def cell(name: str) -> str:
            value = table.columns[name][row] if name and name in table.columns else None
            return "" if value is None or value != value else str(value)

        if self.text:
            return [(self.bos, False), (cell(self.text) + self.eos, True)]
        if self.messages:
            return self._chat(_messages(cell(self.messages), table, row, self.messages))
        response = cell(self.response)
        if self.chat_template:
            content = "\n".join(filter(None, (cell(self.prompt), cell(self.context))))
            return self._chat([{"role": "user", "content": content}, {"role": "assistant", "content": response}])
        return [*self.segments_of_prompt(cell(self.prompt), cell(self.context)), (response + self.eos, True)]

    def _chat(self, messages: list[Message]) -> list[Segment]:
        """Return the segments of a chat: the loss counts the messages of the assistant."""
        segments: list[Segment] = []
        done = ""
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:number], is_open=True)
            after = self._render(messages[: number + 1], is_open=False)
            if not before.startswith(done) or not after.startswith(before):
                problem = "the chat template of the model changes earlier messages, so responses have no fixed place"
                raise DataError(
                    f"{problem}\n  advice    columns with prompt and response, or a model without a template"
                )
            segments += [(before[len(done) :], False), (after[len(before) :], True)]
            done = after
        return segments

    def _render(self, messages: list[Message], *, is_open: bool) -> str:
        """Return a chat as text; ``is_open`` adds the beginning of a response."""
        if not self.chat_template:
            lines = [f"{message['role']}: {message['content']}{self.eos}\n" for message in messages]
            return self.bos + "".join(lines) + ("assistant: " if is_open else "")
        template = tokenizer_of_template(self.tokenizer.tokenizer_json, self.chat_template, self.bos, self.eos)
        try:
            return str(template.apply_chat_template(messages, tokenize=False, add_generation_prompt=is_open))
        except Exception as error:  # a template can raise any error
            problem = f"the chat template of the model refuses a chat: {str(error)[:200]}"
            raise DataError(f"{problem}\n  advice    messages that alternate between user and assistant") from error


def prompt_inputs(folder: Path, *, length: int, **columns: str) -> PromptInputs:
    """Return the inputs of a pretrained causal model.

    Args:
        folder: folder of the model.
        length: number of tokens of a text; longer texts are cut.
        columns: see `PromptInputs`.
    """
    original = auto_tokenizer(folder)
    end = original.eos_token_id
    pad_id = original.pad_token_id if original.pad_token_id is not None else end
    tokenizer = SubwordTokenizer(
        tokenizer_json=original.backend_tokenizer.to_str(), length=length, pad_id=int(pad_id or 0)
    )
    template = original.chat_template if isinstance(original.chat_template, str) else ""
    return PromptInputs(
        tokenizer=tokenizer,
        chat_template=template,
        bos=original.bos_token or "",
        eos=original.eos_token or "",
        **columns,
    )


def _messages(text: str, table: Table, row: int, column: str) -> list[Message]:
    """Return the messages in a cell.

    Raises:
        DataError: the cell is no JSON list of messages; the error names file and row.
    """
    fix = '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}] in this cell'
    try:
        content = json.loads(text)
        messages = [_message(entry) for entry in content]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        problem = f"{table.row_location(row)}, column {column}: no list of messages"
        raise DataError(f"{problem}\n  advice    {fix}") from error
    return messages


def _message(entry: Any) -> Message:
    role = str(entry["role"] if "role" in entry else entry["from"])
    content = entry["content"] if "content" in entry else entry["value"]
    if not isinstance(content, str):
        raise TypeError("a message without text")
    return {"role": ROLES.get(role, role), "content": content}
