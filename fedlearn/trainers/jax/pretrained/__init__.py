"""Models of transformers in JAX: the same configuration, weights, adapters and parameter names as in PyTorch.

Encoders (BERT, RoBERTa, DistilBERT) classify texts or words. Decoders (GPT-2, LLaMA, Mistral, Qwen2) predict the next
token. A model reads ``config.json`` and ``*.safetensors`` of a folder, and needs neither torch nor transformers.
"""

from fedlearn.trainers.jax.pretrained.adapter_files import read_adapter, save_adapter
from fedlearn.trainers.jax.pretrained.generation import generate
from fedlearn.trainers.jax.pretrained.model import TransformerModel, load_model

__all__ = ["TransformerModel", "generate", "load_model", "read_adapter", "save_adapter"]
