"""Write small models of transformers with random weights and real tokenizers into a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

WORDS = [" ".join(f"w{i} good bad film the a of boring great" for i in range(30))] * 3
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def bert(folder: Path, *, positions: int = 64) -> Path:
    """Write an encoder with two layers of width 16, and return its folder."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    pieces = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    pieces.train_from_iterator(
        WORDS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    )
    pieces.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pieces, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BertConfig(vocab_size=pieces.get_vocab_size(), max_position_embeddings=positions, **sizes)
        module = BertForMaskedLM(config)
    return _save(module, tokenizer, folder)


def decoder(folder: Path, kind: str = "gpt2", *, chat_template: str | None = None) -> Path:
    """Write a causal model with two layers of width 16, ``gpt2`` or ``llama``, and return its folder."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces.train_from_iterator(WORDS, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=pieces, eos_token="<|end|>", bos_token="<|end|>", chat_template=chat_template
    )
    ends = {"vocab_size": pieces.get_vocab_size(), "bos_token_id": 0, "eos_token_id": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "gpt2":
            sizes = {"n_positions": 128, "n_embd": 16, "n_layer": 2, "n_head": 2}
            module: Any = transformers.GPT2LMHeadModel(transformers.GPT2Config(**ends, **sizes))
        else:
            sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
            config = transformers.LlamaConfig(**ends, **sizes, num_key_value_heads=1, max_position_embeddings=128)
            module = transformers.LlamaForCausalLM(config)
    return _save(module, tokenizer, folder)


def _save(module: Any, tokenizer: Any, folder: Path) -> Path:
    from transformers.utils import logging

    logging.disable_progress_bar()
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
