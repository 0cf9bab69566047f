"""Train a classifier of transformers on token ids and masks. The configuration is small and its weights are random."""

import numpy as np
from transformers import BertConfig, BertForSequenceClassification

import fedlearn
from strategies import fedavg

rng = np.random.default_rng(1)
NUM_TEXTS, LENGTH = 160, 12
ids = rng.integers(5, 60, (NUM_TEXTS, LENGTH))
sizes = rng.integers(4, LENGTH + 1, NUM_TEXTS)
mask = (np.arange(LENGTH) < sizes[:, None]).astype(np.int64)
labels = (ids[:, 0] % 2).astype(np.int64)  # the first token decides
texts = {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}

config = BertConfig(
    vocab_size=60,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=LENGTH,
    num_labels=2,
)
model = BertForSequenceClassification(config)
clinics = {f"clinic {k}": ({name: part[k::4] for name, part in texts.items()}, labels[k::4]) for k in range(4)}
scenario = fedlearn.Scenario.from_datasets(clinics, model=model, num_classes=2, name="texts")

result = fedlearn.run(
    scenario=scenario,
    strategy=fedavg(),
    local={"optimizer": "adam", "learning_rate": 0.01, "batch_size": 16},
    rounds=4,
    report=False,
)
print(f"first predictions: {result.predict(texts)[:8]}")
result.model.save_pretrained("trained")  # the module of transformers with the trained weights
