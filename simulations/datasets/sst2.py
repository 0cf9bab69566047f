"""Read the Stanford Sentiment Treebank with two classes (SST-2), sentences of film reviews."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import numpy as np

from fedlearn.data.download import DataSet, LocalCopy, OfficialSource, find
from fedlearn.data.text_tokenizers import read_lines

SST2 = DataSet(
    name="sst2",
    about="8,741 sentences of film reviews, 6,920 for training and 1,821 for testing: positive or negative?",
    licence="not stated by its authors",
    citation="Socher et al., Recursive Deep Models for Semantic Compositionality Over a Sentiment Treebank, EMNLP 2013",
    megabytes=0.9,
    origins=(
        OfficialSource(  # whole sentences that are not neutral, in the train and test parts of the authors
            base_url="https://raw.githubusercontent.com/clairett/pytorch-sentiment-classification/"
            "457ffd83de90a9d6d472d8ffc31bbffe40a8b236/data/SST2",
            files={
                "train.tsv": "sha256:ec192f833a64da08f475488a77b0d0b47db47acd0f458bd18433fc793b569920",
                "test.tsv": "sha256:831169c7e2e429d6026e1bdbb542f33b636e3e596caad9602ebc953c205928b7",
            },
        ),
        LocalCopy(
            files={
                "train.tsv.gz": "sha256:6bd7ceeeb9eac01b55c854be40e71bdf4c54849638217b8b4fc2408bf17843af",
                "test.tsv.gz": "sha256:e33b978bf9561af553946a8e7f30f945c46ca74a0c1e44c7b5a4cfc17ce22db3",
            }
        ),
    ),
)


def read_reviews(
    *, path: str | PathLike[str] | None = None
) -> tuple[tuple[list[str], np.ndarray], tuple[list[str], np.ndarray], str]:
    """Read 6,920 training sentences and 1,821 test sentences.

    Args:
        path: folder with the files; None searches for them.

    Returns:
        ``((texts, positive), (test texts, test positive), source)``, with 1 for positive sentences.

    Raises:
        DataError: The files are not available.
    """
    location = find(SST2, path=path)
    parts = {name.partition(".")[0]: file for name, file in location.files.items()}
    return _read_labelled(parts["train"]), _read_labelled(parts["test"]), location.place


def _read_labelled(file: Path) -> tuple[list[str], np.ndarray]:
    rows = [line.rpartition("\t") for line in read_lines(file)]
    return [text for text, _, _ in rows], np.array([int(label) for _, _, label in rows])
