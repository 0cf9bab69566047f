"""Write numbers in the format of Prometheus, by its own client library. Coordinators and nodes use this module."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlearn.core.version import VERSION
from fedlearn.errors import MissingExtra

PREFIX = "fedlearn_"


@dataclass(frozen=True)
class Sample:
    """One number.

    Args:
        name: name of the metric, without the prefix ``fedlearn_``.
        help: description of the metric, equal for all its samples.
        value: the number; None leaves the sample out.
        labels: label -> value.
        kind: ``gauge``, or ``counter`` for a number that only grows; its name ends with ``_total``.
    """

    name: str
    help: str
    value: float | None
    labels: tuple[tuple[str, str], ...] = ()
    kind: str = "gauge"


def format_metrics(collect: Callable[[], Iterable[Sample]]) -> Callable[[], bytes]:
    """Return a function that returns all samples, and the numbers of this process, in the format of Prometheus.

    Args:
        collect: function that returns the present samples.

    Raises:
        MissingExtra: the client library is not installed.
    """
    try:
        from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
    except ImportError as missing:
        raise MissingExtra("--metrics", "web") from missing
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(collect))
    ProcessCollector(registry=registry)
    return lambda: bytes(generate_latest(registry))


@dataclass(frozen=True)
class _Collector:
    samples: Callable[[], Iterable[Sample]]

    def collect(self) -> Iterator[Any]:
        """Yield the families of metrics, as the client library expects them."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        families: dict[str, Any] = {}
        for sample in self.samples():
            kind = CounterMetricFamily if sample.kind == "counter" else GaugeMetricFamily
            labels = [label for label, _ in sample.labels]
            name = PREFIX + sample.name
            family = families.setdefault(name, kind(name, sample.help, labels=labels))
            if sample.value is not None:
                family.add_metric([value for _, value in sample.labels], sample.value)
        yield from families.values()


def common_samples(**folders: Path) -> list[Sample]:
    """Return the version, and the free bytes on the disk of each folder."""
    version = Sample("build_info", "Version of fedlearn.", 1.0, (("version", VERSION),))
    return [version, *(_free_bytes(name, folder) for name, folder in folders.items())]


def _free_bytes(name: str, folder: Path) -> Sample:
    text = "Free bytes on the disk of a folder."
    try:
        return Sample("disk_free_bytes", text, float(shutil.disk_usage(folder).free), (("folder", name),))
    except OSError:
        return Sample("disk_free_bytes", text, None, (("folder", name),))
