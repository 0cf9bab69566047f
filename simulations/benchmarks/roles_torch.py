"""Pretrain the decoder of `simulations.benchmarks.roles`.

Shapes: N tokens, B batch, T positions.
"""

from __future__ import annotations

import sys
from math import cos, pi
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

VOCABULARY, LAYERS, POSITIONS = 1024, 4, 128
BATCH, LENGTH, RATE, WARMUP = 16, 96, 2e-3, 50
END = "<|end|>"


def pretrain(text: str, folder: Path, *, width: int, steps: int) -> None:
    """Train a tokenizer and a GPT-2 on a text, and write both as a folder for ``from_pretrained``."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = byte_pairs(text)
    tokens_N = torch.tensor(tokenizer.encode(text).ids)
    model = decoder(width)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.01)
    for step in range(steps):
        starts_B = torch.randint(0, len(tokens_N) - LENGTH, (BATCH,))
        tokens_BT = torch.stack([tokens_N[start : start + LENGTH] for start in starts_B.tolist()])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=tokens_BT, labels=tokens_BT).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = RATE * min((step + 1) / WARMUP, 0.5 + 0.5 * cos(pi * step / steps))
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            sys.stdout.write(f"step {step}  loss {loss.item():.3f}\n")
            sys.stdout.flush()
    model.save_pretrained(folder)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END)
    fast.save_pretrained(folder)


def byte_pairs(text: str) -> tokenizers.Tokenizer:
    """Return a tokenizer of byte pairs, trained on a text."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer, tokenizer.decoder = level, tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=level.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def decoder(width: int) -> Any:
    """Return a GPT-2 with random weights and without dropout."""
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=POSITIONS,
        n_embd=width,
        n_layer=LAYERS,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)
