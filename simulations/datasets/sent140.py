"""Read Sentiment140, tweets grouped by user.

Shapes: N tweets.
"""

from __future__ import annotations

import csv
import gzip
import io
from os import PathLike

import numpy as np

from fedlearn.data.download import DataSet, OfficialSource, find

FILE = "sent140_by_user.tsv.gz"
SENT140 = DataSet(
    name="sent140-by-user",
    about="16,025 tweets: is the author happy?",
    clients="2,875 users",
    licence="research use",
    citation="Go, Bhayani, Huang, Twitter Sentiment Classification using Distant Supervision, Stanford, 2009",
    origins=(
        OfficialSource(
            base_url="",
            files={FILE: "sha256:e94fa95aedaff3c2dee50ce98d6acea84e98cd29c1176abe92783277ce99834b"},
        ),
    ),
)


def read_tweets(*, path: str | PathLike[str] | None = None) -> tuple[list[str], np.ndarray, np.ndarray, str]:
    """Read the tweets of all users.

    Args:
        path: folder with the file; None searches for it.

    Returns:
        Texts, labels ``(N,)`` (1 for happy), user numbers ``(N,)`` from 0, and the source of the file.

    Raises:
        DataError: The file is not available.
    """
    location = find(SENT140, path=path)
    with io.TextIOWrapper(gzip.open(location.files[FILE]), encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    user_N = np.unique([row["user"] for row in rows], return_inverse=True)[1].ravel()
    return [row["text"] for row in rows], np.array([int(row["label"]) for row in rows]), user_N, location.place
