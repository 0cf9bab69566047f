"""Fine-tune a pretrained encoder on reviews of two shops: adapters and head train, and the base stays frozen.

The base is a small random model. Write the name of your model into ``BASE``, e.g. ``all-minilm-l6-v2``.
"""

import csv
import random
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

import fedlearn

BASE, GOOD, BAD = "base", ("great", "warm", "funny"), ("dull", "slow", "empty")
draw = random.Random(1)
for shop in ("north", "south"):
    Path("reviews").mkdir(exist_ok=True)
    with Path("reviews", f"{shop}.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["review", "label"])
        for _ in range(60):
            label, words = draw.choice([("positive", GOOD), ("negative", BAD)])
            rows.writerow([f"a {draw.choice(words)} film from {shop}", label])

pieces = Tokenizer(models.WordLevel(unk_token="[UNK]"))
pieces.pre_tokenizer = pre_tokenizers.Whitespace()
texts = [" ".join(("a", "film", "from", "north", "south", *GOOD, *BAD))]
pieces.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=["[PAD]", "[UNK]"], show_progress=False))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, pad_token="[PAD]", unk_token="[UNK]")
config = BertConfig(
    vocab_size=pieces.get_vocab_size(),
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=32,
)
for part in (BertModel(config), tokenizer):
    part.save_pretrained(BASE)

settings = {"scenario.path": "reviews", "scenario.length": 16, "model.path": BASE, "model.targets": ["query", "value"]}
local = {"epochs": 5, "learning_rate": 0.01}
result = fedlearn.run("text", rounds=3, local=local, settings=settings, report=False)
print(result.predict({"review": ["a warm film from north", "a slow film from south"]}))
