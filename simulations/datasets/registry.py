"""``python -m simulations.data list | fetch NAME | check NAME``: the scenarios' data sets, and where they are here.

Scenarios that ship with a dependency (digits, diabetes) have nothing to fetch and are not listed.
"""

from __future__ import annotations

import argparse
import importlib.util
import pkgutil
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path

from fedlearn.data.download import DataSet, LocatedFiles, find, find_local
from fedlearn.errors import DataError, SettingError, did_you_mean
from fedlearn.runner.exit_codes import DONE, FAILED
from simulations import scenarios


def data_sets() -> Mapping[str, DataSet]:
    """Every `DataSet` that a module of ``simulations.scenarios`` has at its top level, by name.

    Only modules that describe one are imported, as their text says, so that this takes no framework and little time.
    """
    found: dict[str, DataSet] = {}
    for module in pkgutil.iter_modules(scenarios.__path__, f"{scenarios.__name__}."):
        spec = importlib.util.find_spec(module.name)
        if spec and spec.origin and "DataSet(" in Path(spec.origin).read_text(encoding="utf-8"):
            sets = (value for value in vars(import_module(module.name)).values() if isinstance(value, DataSet))
            found |= {data.name: data for data in sets}
    return dict(sorted(found.items()))


def table(sets: Sequence[DataSet]) -> str:
    """A line for each data set: name, clients, size to download, licence, and where it is here."""
    rows = [("data set", "clients", "size", "licence", "here")]
    for data in sets:
        here = find_local(data)
        rows.append((data.name, data.clients or "–", _size(data), data.licence or "–", here.place if here else "no"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n" for row in rows
    )


def describe_data_set(data: DataSet, location: LocatedFiles | None) -> str:
    """All that is known of one data set, a line each, and its files with their sizes if they are here."""
    origins = ", or ".join(map(str, data.origins))
    known = {"about": data.about, "clients": data.clients, "licence": data.licence, "cite": data.citation}
    lines = [("data set", data.name), *known.items(), ("from", origins), ("here", location.place if location else "no")]
    files = (
        [("file", f"{path} ({path.stat().st_size:,} bytes)") for path in location.files.values()] if location else []
    )
    return "".join(f"{word:<9} {text}\n" for word, text in (*lines, *files) if text)


def _asked_for(args: argparse.Namespace) -> int:
    known = data_sets()
    if args.command == "list":
        sys.stdout.write(table([*known.values()]))
        return DONE
    if args.name not in known:
        near = did_you_mean(args.name, known) or "heart-disease-uci"
        raise SettingError("NAME", args.name, f"one of {', '.join(known)}", f"{args.command} {near}")
    return _fetch(known[args.name], args.base_url) if args.command == "fetch" else _check(known[args.name], args.path)


def _fetch(data: DataSet, base_url: str | None) -> int:
    try:
        found = find(data, base_url=base_url)
    except DataError as error:
        sys.stderr.write(f"{error}\n")
        return FAILED
    sys.stdout.write(describe_data_set(data, found))
    return DONE


def _check(data: DataSet, path: str | None) -> int:
    found = find_local(data, path=path)
    sys.stdout.write(describe_data_set(data, found))
    if found is None:
        sys.stderr.write(f"{data.name} is not here, or is damaged\n  try       {_fix(data, path)}\n")
    return DONE if found else FAILED


def _fix(data: DataSet, path: str | None) -> str:
    return "check without --path" if path else f"python -m simulations.data fetch {data.name}"


def _size(data: DataSet) -> str:
    return "–" if data.megabytes is None else f"{data.megabytes:,.3g} MB"
