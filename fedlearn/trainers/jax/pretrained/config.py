"""Read ``config.json`` of a model of transformers into a checked record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import pi
from typing import Any

import numpy as np

from fedlearn.errors import is_count, is_number, require

ENCODERS, DECODERS = ("bert", "roberta", "distilbert"), ("gpt2", "llama", "mistral", "qwen2")
LARGEST_SIZE = 2**20  # largest accepted width or number of tokens; a file of another party must not ask for more
LARGEST_DEPTH = 1024
ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of a transformer.

    Args:
        kind: one of `ENCODERS` or `DECODERS`, the ``model_type`` of transformers.
        vocab_size: number of tokens.
        width: width of the vector of a token.
        num_layers: number of layers.
        num_heads: number of heads of the queries.
        num_key_value_heads: number of heads of keys and values; each serves a group of heads of the queries.
        head_width: width of a head.
        hidden: hidden width of the perceptron of a layer.
        num_positions: largest number of tokens.
        epsilon: constant in the denominator of a norm.
        activation: activation of the perceptron.
        pad_token: number of the padding token.
        num_token_types: number of parts of a text that have a vector each; 0 without such vectors.
        is_tied: whether the output layer is the token embedding.
        has_bias: whether the projections of the attention have biases: query, key and value; output; perceptron.
        inverse_frequencies: angular velocities of the rotary embedding; empty without one.
        window: number of tokens that a token attends to; None for all earlier tokens.
    """

    kind: str
    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_width: int
    hidden: int
    num_positions: int
    epsilon: float
    activation: str
    pad_token: int | None = None
    num_token_types: int = 0
    is_tied: bool = False
    has_bias: tuple[bool, bool, bool] = (True, True, True)
    inverse_frequencies: np.ndarray = field(default_factory=lambda: np.zeros(0), compare=False)
    window: int | None = None

    @property
    def is_encoder(self) -> bool:
        """True for an encoder, False for a decoder."""
        return self.kind in ENCODERS

    def require_task(self, task: str) -> None:
        """Refuse a task that the model has no head for.

        Raises:
            SettingError: an encoder cannot write texts, and a decoder has no head for classes.
        """
        is_causal, fix = task == "causal_lm", "framework=torch"
        expected = "a decoder, e.g. gpt2 or llama" if is_causal else f"one of {', '.join(ENCODERS)}"
        shown = f"{self.kind} with task={task} in JAX"
        require(is_causal != self.is_encoder, "model.path", shown, expected, fix)


class _Reader:
    """Read values of a configuration. An error has the name of the value."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def count(self, *names: str, default: int | None = None, largest: int = LARGEST_SIZE) -> int:
        """Return the first of these whole numbers >= 1 that is present."""
        value = self.first(*names, default=default)
        self.check(is_count(value) and value <= largest, names[0], value, f"a whole number in 1..{largest}")
        return int(value)

    def number(self, *names: str, default: float, below: float = float("inf")) -> float:
        """Return the first of these numbers >= 0 that is present."""
        value = self.first(*names, default=default)
        self.check(is_number(value, at_least=0, below=below), names[0], value, f"a number in [0, {below})")
        return float(value)

    def first(self, *names: str, default: Any = None) -> Any:
        """Return the first of these values that is present and not null."""
        return next((self.values[name] for name in names if self.values.get(name) is not None), default)

    def check(self, condition: bool, name: str, value: Any, expected: str) -> None:
        """Raise an error for a value of the configuration."""
        require(condition, f"{name} in config.json", str(value)[:80], expected, "another model")


def read_config(values: Any) -> ModelConfig:
    """Return the record of a parsed ``config.json``.

    Raises:
        SettingError: the model has another type, or a value is out of range or not supported in JAX.
    """
    reader = _Reader(values if isinstance(values, Mapping) else {})
    kind = reader.first("model_type")
    kinds = (*ENCODERS, *DECODERS)
    reader.check(kind in kinds, "model_type", kind, f"one of {', '.join(kinds)}; framework=torch runs any model")
    activation = reader.first("hidden_act", "activation", "activation_function", default="gelu")
    reader.check(activation in ACTIVATIONS, "hidden_act", activation, f"one of {', '.join(ACTIVATIONS)}")
    width, heads = (
        reader.count("hidden_size", "dim", "n_embd"),
        reader.count("num_attention_heads", "n_heads", "n_head"),
    )
    groups = reader.count("num_key_value_heads", default=heads)
    reader.check(heads % groups == 0, "num_key_value_heads", groups, f"a divisor of {heads}")
    is_rotary = kind in DECODERS[1:]
    has_width = is_rotary and reader.first("head_dim") is not None
    reader.check(has_width or width % heads == 0, "hidden_size", width, f"a multiple of {heads}")
    head_width = reader.count("head_dim") if has_width else width // heads
    reader.check(not is_rotary or head_width % 2 == 0, "head_dim", head_width, "an even number")
    reader.check(not reader.first("scale_attn_by_inverse_layer_idx"), "scale_attn_by_inverse_layer_idx", True, "false")
    return ModelConfig(
        kind=kind,
        vocab_size=reader.count("vocab_size", largest=2**24),
        width=width,
        num_layers=reader.count("num_hidden_layers", "n_layers", "n_layer", largest=LARGEST_DEPTH),
        num_heads=heads,
        num_key_value_heads=groups,
        head_width=head_width,
        hidden=reader.count("intermediate_size", "hidden_dim", "n_inner", default=4 * width),
        num_positions=reader.count("max_position_embeddings", "n_positions", largest=2**24),
        epsilon=_epsilon(reader, kind),
        activation=activation,
        pad_token=_pad_token(reader, kind),
        num_token_types=reader.count("type_vocab_size", default=2) if kind in ("bert", "roberta") else 0,
        is_tied=bool(reader.first("tie_word_embeddings", default=kind == "gpt2")),
        has_bias=_biases(reader, kind),
        inverse_frequencies=_inverse_frequencies(reader, head_width) if is_rotary else np.zeros(0),
        window=_window(reader, kind),
    )


def _epsilon(reader: _Reader, kind: str) -> float:
    return (
        1e-12
        if kind == "distilbert"
        else reader.number(
            "layer_norm_eps", "rms_norm_eps", "layer_norm_epsilon", default=1e-5 if kind == "gpt2" else 1e-6
        )
    )


def _pad_token(reader: _Reader, kind: str) -> int | None:
    end = reader.first("eos_token_id")
    end = end[0] if isinstance(end, list) and end else end
    default = end if kind in DECODERS and is_count(end, at_least=0) else {"roberta": 1}.get(kind, 0)  # as in PyTorch
    token = reader.first("pad_token_id", default=default)
    reader.check(token is None or is_count(token, at_least=0), "pad_token_id", token, "a whole number >= 0")
    return None if token is None else int(token)


def _biases(reader: _Reader, kind: str) -> tuple[bool, bool, bool]:
    """Return whether query, key and value, the output of attention, and the perceptron have biases."""
    if kind == "qwen2":
        return True, False, False
    if kind in ("llama", "mistral"):
        attention = bool(reader.first("attention_bias", default=False)) and kind == "llama"
        return attention, attention, bool(reader.first("mlp_bias", default=False)) and kind == "llama"
    return True, True, True


def _window(reader: _Reader, kind: str) -> int | None:
    is_used = kind == "mistral" or (kind == "qwen2" and bool(reader.first("use_sliding_window", default=False)))
    reader.check(kind != "qwen2" or not is_used, "use_sliding_window", True, "false; framework=torch runs any model")
    return reader.count("sliding_window") if is_used and reader.first("sliding_window") is not None else None


def _inverse_frequencies(reader: _Reader, head_width: int) -> np.ndarray:
    """Return the angular velocities of the rotary embedding, with the scaling of the configuration.

    Reference: Su et al., *RoFormer: Enhanced Transformer with Rotary Position Embedding*, 2021, arXiv:2104.09864.
    """
    rope = {**(reader.first("rope_scaling") or {}), **(reader.first("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    known = ("default", "linear", "llama3")
    reader.check(kind in known, "rope_type", kind, f"one of {', '.join(known)}; framework=torch runs any model")
    part = rope.get("partial_rotary_factor", 1.0)
    reader.check(part == 1.0, "partial_rotary_factor", part, "1.0; framework=torch runs any model")
    base = _Reader({**reader.values, **rope}).number("rope_theta", default=10000.0)
    speeds = 1.0 / base ** (np.arange(0, head_width, 2, dtype=np.float32) / np.float32(head_width))
    if kind == "default":
        return speeds.astype(np.float32)
    factor = _Reader(rope).number("factor", default=1.0)
    reader.check(factor >= 1, "factor", factor, "a number >= 1")
    return (speeds / factor if kind == "linear" else _llama3(_Reader(rope), speeds, factor)).astype(np.float32)


def _llama3(rope: _Reader, speeds: np.ndarray, factor: float) -> np.ndarray:
    """Return the velocities of LLaMA 3: slow ones are divided by the factor, fast ones stay, others are between."""
    low, high = rope.number("low_freq_factor", default=1.0), rope.number("high_freq_factor", default=4.0)
    length = rope.count("original_max_position_embeddings", default=8192, largest=2**24)
    rope.check(high > low, "high_freq_factor", high, f"a number > {low}")
    wavelengths = 2 * pi / speeds
    smooth = np.clip((length / wavelengths - low) / (high - low), 0.0, 1.0)
    return (1 - smooth) * speeds / factor + smooth * speeds
