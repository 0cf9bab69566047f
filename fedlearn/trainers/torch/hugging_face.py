"""Build a pretrained model of transformers with adapters of peft, and train it.

Shapes: B batch, T tokens, W words, C outputs, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from fedlearn.algorithm.local_rule import LocalRule
from fedlearn.core.adapters import LORA_A
from fedlearn.core.federated_data import FederatedData
from fedlearn.core.inputs import join_inputs
from fedlearn.core.records import Array, ClientWork, Request, Updates
from fedlearn.data.pretrained_files import PretrainedFiles
from fedlearn.data.subword_tokenizer import IDS, IGNORED, LABELS, MASK, POSITIONS
from fedlearn.errors import DataError, MissingExtra, SettingError, require
from fedlearn.trainers.pretrained import CAUSAL, TOKENS, PretrainedModel, initializer
from fedlearn.trainers.torch.device import single_threaded
from fedlearn.trainers.torch.frozen_layers import FrozenLayers
from fedlearn.trainers.torch.trainer import TorchTrainer

PREDICTED_TOKENS = 8192  # tokens of a forward pass in an evaluation
PREDICTED_LOGITS = 2**25  # logits of a forward pass in an evaluation, 128 MiB


@dataclass(frozen=True, kw_only=True)
class BuiltModel:
    """Hold a module of transformers, ready for training.

    Args:
        module: the module. Exactly the parameters in ``trained`` have ``requires_grad``. Adapters are layers of peft
            inside the module, so the names of other parameters do not change.
        trained: names of the trained parameters, sorted: adapters end in ``.lora_A.default.weight`` and
            ``.lora_B.default.weight``; all others are the head, or all parameters.
        head: names of the trained parameters of the head.
        pretrained: values of the trained parameters that the checkpoint holds, by name.
    """

    module: nn.Module
    trained: tuple[str, ...]
    head: tuple[str, ...]
    pretrained: Mapping[str, np.ndarray]


def build_model(model: PretrainedModel, files: PretrainedFiles, *, task: str, num_labels: int) -> BuiltModel:
    """Load a pretrained model, and prepare its fine-tuning.

    Args:
        model: settings of the model.
        files: files of the model.
        task: name of the task: ``causal_lm``, ``token_classification``, or any other for outputs per text.
        num_labels: number of outputs of the head; without effect for ``causal_lm``.

    Raises:
        SettingError: a setting does not fit the model.
        DataError: the library cannot load the model.
        MissingExtra: transformers or peft is not installed.

    *Guarantees*: the global generator of torch does not change. No code of the folder runs.
    """
    with torch.random.fork_rng(devices=[]):
        module, missing = _load(model, files, task=task, num_labels=num_labels)
    head = _head(module, missing, task)
    has_head = model.adapter != "head" or bool(head)
    require(has_head, "model.adapter", model.adapter, "lora or full: the model has no new head", "model.adapter=lora")
    names = {name for name, _ in module.named_parameters()} - missing
    if model.adapter == "lora":
        _add_adapters(module, model, head)
    if model.mergeable:
        _add_merged_matrices(module)
    tuned = set(head) | (_tuned_layers(module, model) if model.adapter == "full" else set())
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in tuned or ".lora_" in name)
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    if model.gradient_checkpointing:
        _checkpoint_gradients(module)
    return BuiltModel(
        module=module,
        trained=tuple(sorted(trained)),
        head=head,
        pretrained={name: p.detach().numpy().copy() for name, p in trained.items() if name in names},
    )


def _head(module: nn.Module, missing: frozenset[str], task: str) -> tuple[str, ...]:
    """Return the names of the parameters of the head: all outside of the base, and all that the checkpoint lacks.

    Raises:
        DataError: the checkpoint lacks most parameters of the base.
    """
    prefix = f"{module.base_model_prefix}."
    base = [name for name, _ in module.named_parameters() if name.startswith(prefix)]
    lacking = [name for name in base if name in missing]
    if 2 * len(lacking) > len(base):
        problem = f"the weights of the model lack {len(lacking)} of {len(base)} parameters, e.g. {lacking[0]}"
        raise DataError(f"{problem}\n  advice    weights and config.json of the same model")
    outside = () if task == CAUSAL else tuple(n for n, _ in module.named_parameters() if not n.startswith(prefix))
    return tuple(sorted({*outside, *(name for name, _ in module.named_parameters() if name in missing)}))


def build_trainer(
    model: PretrainedModel, files: PretrainedFiles, data: FederatedData, *, length: int, device: str = "cpu"
) -> TorchTrainer:
    """Return a trainer; see `fedlearn.trainers.pretrained.build_pretrained`."""
    task = data.task.name
    num_labels = 2 if task == "binary" else data.task.num_outputs(data.num_classes)
    built = build_model(model, files, task=task, num_labels=num_labels)
    _require_positions(built.module, length)
    trainer = HuggingFaceTrainer(
        built.module,
        task=data.task,
        initial=initializer(built.pretrained),
        device=device,
        forward=_FORWARDS.get(task, classify),
        trim=trim,
    )
    trainer.pretrained, trainer.files, trainer.trained, trainer.head = model, files, built.trained, built.head
    return trainer


class HuggingFaceTrainer(TorchTrainer):
    """Train a module of transformers. Batches are as wide as their longest text, and evaluations need little memory.

    Attributes:
        pretrained: settings of the model.
        files: files of the model.
        trained: names of the trained parameters.
        head: names of the trained parameters of the head.
    """

    pretrained: PretrainedModel
    files: PretrainedFiles
    trained: tuple[str, ...]
    head: tuple[str, ...]

    @cached_property
    def _frozen(self) -> FrozenLayers:
        return FrozenLayers(self._model.module, self.device)

    def _fit(self, request: Request, rule: LocalRule, work: Sequence[ClientWork]) -> Updates:
        if request.local.example_dp:  # gradients of examples may need vmap
            return super()._fit(request, rule, work)
        with self._frozen.using():
            return super()._fit(request, rule, work)

    def predict(self, params_D: Array, x: Any) -> np.ndarray:
        """Return the outputs of each text: ``(N, C)``, ``(N, W, C)`` for words, or ``(N, 3)`` for ``causal_lm``."""
        x = join_inputs(x)
        self._model.load(params_D)
        self._model.module.eval()
        lengths_N = x[MASK].sum(axis=1)
        order = np.argsort(lengths_N, kind="stable")  # texts of similar length share a forward pass
        outputs: list[torch.Tensor] = []
        with torch.inference_mode(), single_threaded(self.device), self._frozen.using():
            for rows in _parts(order, lengths_N, self._num_logits()):
                outputs.append(self._model.module(trim(self._model.inputs(x[rows]))).float().cpu())
            if not outputs:
                outputs = [self._model.module(self._model.inputs(x)).float().cpu()]
        result = torch.empty_like(together := torch.cat(outputs))
        result[torch.from_numpy(order)] = together
        return result.numpy()

    def generate(
        self, params_D: Array, ids: Sequence[int], *, num_tokens: int, temperature: float, seed: int
    ) -> list[int]:
        """Return the tokens that continue a text, until the end token of the model. Equal arguments give equal tokens.

        Args:
            params_D: parameters.
            ids: token numbers of the beginning, at least one.
            num_tokens: largest number of new tokens, >= 1.
            temperature: softmax temperature, >= 0; 0 takes the most likely token.
            seed: seed of the draws.
        """
        module: Any = self.network(params_D)
        start_1T = torch.tensor([list(ids)], device=self.device)
        draws = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        with torch.inference_mode(), torch.random.fork_rng(devices=[]), single_threaded(self.device), quiet():
            torch.manual_seed(seed)
            text_1T = module.generate(
                start_1T,
                attention_mask=torch.ones_like(start_1T),
                max_new_tokens=num_tokens,
                pad_token_id=_padding(module.config),
                **draws,
            )
        return [int(token) for token in text_1T[0, len(ids) :]]

    def _num_logits(self) -> int:
        """Return the number of logits of a token."""
        return int(getattr(self.module.config, "vocab_size", 1)) if self.task.name == CAUSAL else 1


def _parts(order: np.ndarray, lengths_N: np.ndarray, num_logits: int) -> Iterator[np.ndarray]:
    """Yield row numbers of parts with few tokens, or one text each."""
    most, start = min(PREDICTED_TOKENS, max(1, PREDICTED_LOGITS // num_logits)), 0
    for end in range(1, len(order) + 1):
        width = max(1, int(lengths_N[order[end]])) if end < len(order) else 0
        if end == len(order) or width * (end + 1 - start) > most:
            yield order[start:end]
            start = end


def trim(x_B: Any) -> Any:
    """Return a batch without the positions after its longest text. Padding does not change the outputs."""
    longest = max(1, int(x_B[MASK].sum(dim=1).max())) if len(x_B[MASK]) else 1
    return {name: part if name == POSITIONS else part[:, :longest] for name, part in x_B.items()}


def classify(module: nn.Module, x_B: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the logits of each text, ``(B, C)``."""
    logits_BC: torch.Tensor = module(input_ids=x_B[IDS], attention_mask=x_B[MASK]).logits
    return logits_BC


def classify_two(module: nn.Module, x_B: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the logit of the second class of each text, ``(B, 1)``: the difference of two logits."""
    logits_B2 = classify(module, x_B)
    return logits_B2[:, 1:] - logits_B2[:, :1]


def classify_tokens(module: nn.Module, x_B: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the logits at the first subword of each word, ``(B, W, C)``."""
    logits_BTC = module(input_ids=x_B[IDS], attention_mask=x_B[MASK]).logits
    places_BW = x_B[POSITIONS].long().clamp(min=0)
    return logits_BTC.gather(1, places_BW[:, :, None].expand(-1, -1, logits_BTC.shape[2]))


def score_texts(module: nn.Module, x_B: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the three outputs of each text, ``(B, 3)``; see `fedlearn.core.tasks.language`."""
    logits_BTV = module(input_ids=x_B[IDS], attention_mask=x_B[MASK], use_cache=False).logits
    return score_tokens(logits_BTV, x_B[LABELS])


def score_tokens(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Return the three outputs of each text, ``(B, 3)``, from the logits and the labels of its tokens."""
    logits_BTV, next_BT = logits_BTV[:, :-1], labels_BT[:, 1:].long()
    counted_BT = next_BT != IGNORED
    nll_BT = F.cross_entropy(logits_BTV.transpose(1, 2).float(), next_BT, ignore_index=IGNORED, reduction="none")
    is_correct_BT = (logits_BTV.detach().argmax(dim=2) == next_BT) & counted_BT
    return torch.stack([nll_BT.sum(1), is_correct_BT.sum(1).float(), counted_BT.sum(1).float()], dim=1)


def build_decoder(values: Mapping[str, Any]) -> nn.Module:
    """Return a decoder without trained weights from the values of a ``config.json``.

    Raises:
        MissingExtra: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra("a decoder with framework=torch", "hf") from error
    with quiet(), torch.random.fork_rng(devices=[]):
        config = transformers.AutoConfig.for_model(**values)
        module: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return module


_FORWARDS = {"binary": classify_two, TOKENS: classify_tokens, CAUSAL: score_texts}


def _load(
    model: PretrainedModel, files: PretrainedFiles, *, task: str, num_labels: int
) -> tuple[nn.Module, frozenset[str]]:
    """Return the module, and the names of the parameters that are not in the checkpoint."""
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra(f"model.path={model.path}", "hf") from error
    kind = {CAUSAL: "AutoModelForCausalLM", TOKENS: "AutoModelForTokenClassification"}.get(
        task, "AutoModelForSequenceClassification"
    )
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    with quiet():
        try:
            config = transformers.AutoConfig.from_pretrained(files.folder, **local)
            _set_dropout(config, model.dropout)
            if task != CAUSAL:
                config.num_labels = num_labels
            if getattr(config, "pad_token_id", None) is None:  # a classifier needs it for batches
                config.pad_token_id = _padding(config)
            module, report = getattr(transformers, kind).from_pretrained(
                files.folder,
                config=config,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=task != CAUSAL,
                **local,
            )
        except Exception as error:  # the library raises many kinds
            reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
            problem = f"model.path is {model.path}: transformers cannot load it for {task} ({reason})"
            fix = "a model of transformers for this task, without code of its own"
            raise DataError(f"{problem}\n  expected  {kind}\n  advice    {fix}") from error
    replaced = {entry[0] if isinstance(entry, tuple) else entry for entry in report.get("mismatched_keys", ())}
    return module, frozenset(report["missing_keys"]) | frozenset(replaced)


def _padding(config: Any) -> int:
    end = getattr(config, "eos_token_id", None)
    end = end[0] if isinstance(end, list) and end else end
    return end if isinstance(end, int) else 0


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress the messages and the progress bars of transformers."""
    from transformers.utils import logging

    level, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bars:
            logging.enable_progress_bar()


def _set_dropout(config: Any, rate: float) -> None:
    """Set the dropout of the base to zero, and the dropout before the head to a rate."""
    for name, value in list(vars(config).items()):
        if "drop" in name and (value is None or isinstance(value, float | int)) and not isinstance(value, bool):
            setattr(config, name, rate if "classif" in name else 0.0)


def _add_adapters(module: nn.Module, model: PretrainedModel, head: Sequence[str]) -> None:
    """Add layers of LoRA to the module, but not to its head."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise MissingExtra("model.adapter=lora", "hf") from error
    config = lora_config(module, model, head)
    try:
        with torch.random.fork_rng(devices=[]):
            inject_adapter_in_model(LoraConfig(**config), module)
    except ValueError as error:
        maps = sorted({name.rpartition(".")[2] for name, part in module.named_modules() if isinstance(part, nn.Linear)})
        expected = f"names of affine maps of the model, such as {', '.join(maps[:8])}, or all-linear"
        raise SettingError("model.targets", model.targets, expected, "model.targets=all-linear") from error


def _add_merged_matrices(module: nn.Module) -> None:
    """Add a matrix M to each adapted map, at zero: its output gets the summand ``alpha / r M x``."""
    layers = [name.removesuffix(LORA_A) for name, _ in module.named_parameters() if name.endswith(LORA_A)]
    for layer in map(module.get_submodule, layers):
        adapted: Any = layer
        adapted.lora_merged = nn.Linear(adapted.in_features, adapted.out_features, bias=False)
        nn.init.zeros_(adapted.lora_merged.weight)
        layer.register_forward_hook(_add_merged)


def _add_merged(layer: Any, inputs: tuple[Any, ...], output: Any) -> Any:
    return output + layer.scaling["default"] * layer.lora_merged(inputs[0])


def lora_config(module: nn.Module, model: PretrainedModel, head: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of ``peft.LoraConfig`` for a model and the names of the parameters of its head."""
    depth = num_layers(module)
    layers = None if model.layers is None else list(range(depth - _tuned_depth(model, depth), depth))
    targets = list(model.targets) if isinstance(model.targets, tuple) else model.targets
    if targets == "all-linear" and layers is not None:  # peft accepts numbers of layers with names only
        affine = [name for name, part in module.named_modules() if type(part).__name__ in ("Linear", "Conv1D")]
        targets = sorted({name.rpartition(".")[2] for name in affine if any(map(str.isdigit, name.split(".")))})
    return {
        "r": model.rank,
        "lora_alpha": model.alpha,
        "target_modules": targets,
        "lora_dropout": model.dropout,
        "layers_to_transform": layers,
        "exclude_modules": modules_of(head) or None,
        "fan_in_fan_out": any(type(part).__name__ == "Conv1D" for part in module.modules()),  # GPT-2 transposes weights
    }


def modules_of(names: Sequence[str]) -> list[str]:
    """Return the names of the modules of some parameters, sorted."""
    return sorted({name.rpartition(".")[0] for name in names})


def num_layers(module: nn.Module) -> int:
    """Return the number of layers of a model of transformers."""
    config: Any = module.config
    return int(getattr(config, "num_hidden_layers", 0) or getattr(config, "n_layer", 0) or 0)


def _tuned_depth(model: PretrainedModel, depth: int) -> int:
    assert model.layers is not None
    expected = f"at most {depth}, the number of layers of the model"
    require(model.layers <= depth, "model.layers", model.layers, expected, f"model.layers={depth}")
    return model.layers


def _tuned_layers(module: nn.Module, model: PretrainedModel) -> set[str]:
    """Return the names of the parameters of the base that full fine-tuning trains."""
    names = {name for name, _ in module.named_parameters()}
    if model.layers is None:
        return names
    depth = num_layers(module)
    last = {str(layer) for layer in range(depth - _tuned_depth(model, depth), depth)}
    blocks = {name for name, part in module.named_modules() if isinstance(part, nn.ModuleList) and len(part) == depth}
    return {
        name
        for name in names
        if any(name.startswith(f"{block}.") and name[len(block) + 1 :].partition(".")[0] in last for block in blocks)
    }


def _checkpoint_gradients(module: nn.Module) -> None:
    supports = bool(getattr(module, "supports_gradient_checkpointing", False))
    setting, fix = "model.gradient_checkpointing", "model.gradient_checkpointing=false"
    require(supports, setting, True, "false: the model does not support it", fix)
    enable: Any = module.activation_checkpointing_enable
    enable(activation_checkpointing_kwargs={"use_reentrant": False})


def _require_positions(module: nn.Module, length: int) -> None:
    """Refuse texts with more tokens than the model has positions."""
    config: Any = module.config
    most = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    fits = not isinstance(most, int) or length <= most
    require(fits, "length", length, f"at most {most}, the number of positions of the model", f"length={most}")
