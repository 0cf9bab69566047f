"""The programs of `simulations.benchmarks.adapters`, on a BERT with random weights.

Shapes: K clients, D parameters of the adapters and the head, N sentences, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import peft
import torch
import transformers
from torch.nn.functional import binary_cross_entropy_with_logits

from fedlearn import Examples, FederatedData, LocalSettings, Strategy, vector
from fedlearn.algorithm import everyone
from fedlearn.core.inputs import join_inputs, map_inputs, split_inputs
from fedlearn.core.records import Request, Updates
from fedlearn.engines.base import InProcessEngine
from fedlearn.trainers.torch.hugging_face import HuggingFaceTrainer, classify_two, trim

STRATEGY = Strategy(select=everyone())
RATE, MAX_NORM, RANK, HEADS, VOCABULARY = 1e-3, 1.0, 8, 8, 30_522


class Cohort:
    """Hold a model, a trainer and the sentences of some clients.

    Args:
        batch: sentences of a batch.
        length: largest number of tokens of a sentence.
        varied: whether lengths vary from a quarter of the tokens to all.
        width: features of the model.
        depth: layers of the model.
        tuned: last layers with adapters.
        clients: number of clients.
        steps: steps of a client in a round.
        precision: ``float32`` or ``bfloat16``.
        cores: threads of a program.

    Attributes:
        programs: name -> function that trains all clients for a round, and returns their updates ``delta_KD``.
        num_bytes: size of the base and of the adapters of all clients.
    """

    def __init__(
        self,
        *,
        batch: int,
        length: int,
        varied: bool,
        width: int,
        depth: int,
        tuned: int,
        clients: int,
        steps: int,
        precision: str,
        cores: int,
    ) -> None:
        torch.set_num_threads(cores)
        self.module = adapted_bert(width, depth, tuned)
        self.trainer = HuggingFaceTrainer(self.module, task="binary", forward=classify_two, trim=trim)
        self.examples = [sentences(batch * steps, length, varied=varied, seed=k) for k in range(clients)]
        local = LocalSettings(
            batch_size=batch,
            steps=steps,
            optimizer="adamw",
            learning_rate=RATE,
            max_grad_norm=MAX_NORM,
            precision=precision,
        )
        self.request = Request(round=1, seed=1, params_D=self.trainer.init(1), local=local)
        data = FederatedData(
            task="binary",
            num_classes=2,
            clients=range(clients),
            train=self.examples.__getitem__,
            test=self.examples.__getitem__,
        )
        alone = "map" if cores == 1 else "process_pool"
        engines = {
            "alone": vector(data, self.trainer, batching=alone),
            "joint": vector(data, self.trainer, batching="joint"),
        }
        self.programs: Mapping[str, Callable[[], Any]] = {
            "peft": self.plain_loop,
            **{name: partial(self._fit, engine) for name, engine in engines.items()},
        }
        base = sum(part.numel() for part in self.module.parameters() if not part.requires_grad)
        self.num_bytes = 4 * (base + clients * self.trainer.layout.num_parameters)

    def _fit(self, engine: InProcessEngine) -> Any:
        results = engine.fit(self.request, STRATEGY, engine.clients)
        return np.concatenate([result.delta_KD for result in results if isinstance(result, Updates)])

    def plain_loop(self) -> Any:
        """Train one client after another, as a program with peft and torch alone."""
        weights = {name: part for name, part in self.module.named_parameters() if part.requires_grad}
        slices, updates = self.trainer.layout.slices, np.empty((len(self.examples), self.trainer.layout.num_parameters))
        start = {name: torch.from_numpy(self.request.params_D[slices[name]]).clone() for name in weights}
        self.module.train()
        for examples, update_D in zip(self.examples, updates, strict=True):
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.copy_(start[name].view_as(weight))
            self._train_plainly(examples, list(weights.values()))
            for name, weight in weights.items():
                update_D[slices[name]] = (weight.detach().flatten() - start[name]).numpy()
        return updates

    def _train_plainly(self, examples: Examples, weights: Sequence[torch.nn.Parameter]) -> None:
        """Train one client. All batches have one size, so their order is the order of the examples."""
        optimizer = torch.optim.AdamW(weights, RATE, weight_decay=0.0)
        inputs, y_N = map_inputs(torch.from_numpy, split_inputs(examples.x)), torch.from_numpy(examples.y)
        for rows_B in torch.arange(len(y_N)).split(self.request.local.batch_size):
            optimizer.zero_grad()
            self._loss(inputs, y_N, rows_B).backward()
            torch.nn.utils.clip_grad_norm_(weights, MAX_NORM)
            optimizer.step()

    def _loss(self, inputs: Mapping[str, torch.Tensor], y_N: torch.Tensor, rows_B: torch.Tensor) -> torch.Tensor:
        x_B = trim({name: part[rows_B] for name, part in inputs.items()})
        is_mixed = self.request.local.precision == "bfloat16"
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_mixed):
            logits_B1 = classify_two(self.module, x_B)
        return binary_cross_entropy_with_logits(logits_B1[:, 0].float(), y_N[rows_B])


def adapted_bert(width: int, depth: int, tuned: int) -> Any:
    """Return a BERT with adapters in its last layers, which train together with the head."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=HEADS,
        intermediate_size=4 * width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    module = transformers.BertForSequenceClassification(config)
    layers = None if tuned == depth else list(range(depth - tuned, depth))
    adapters = peft.LoraConfig(r=RANK, target_modules=["query", "value"], layers_to_transform=layers)
    peft.inject_adapter_in_model(adapters, module)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("lora_" in name or name.startswith("classifier"))
    return module


def sentences(number: int, length: int, *, varied: bool, seed: int) -> Examples:
    """Return sentences of random tokens with random classes."""
    rng = np.random.default_rng(seed)
    lengths_N = rng.integers(max(3, length // 4), length + 1, number) if varied else np.full(number, length)
    mask_NT = (np.arange(length) < lengths_N[:, None]).astype(np.int32)
    ids_NT = rng.integers(5, VOCABULARY, (number, length)).astype(np.int32) * mask_NT
    x = join_inputs({"input_ids": ids_NT, "attention_mask": mask_NT})
    return Examples(x, rng.integers(0, 2, number).astype(np.float32))
