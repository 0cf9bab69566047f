"""Check the data of a simulated run at its start, in a bounded time."""

from __future__ import annotations

import logging
from pathlib import Path

from fedlearn.data.contents import Contents
from fedlearn.data.data_check.check import check_data
from fedlearn.data.data_check.image_check import check_images
from fedlearn.data.data_check.records import DataCheck
from fedlearn.data.data_check.settings import check_settings
from fedlearn.data.data_check.typed_columns import TypedColumns
from fedlearn.data.table_settings import TableSettings

log = logging.getLogger(__name__)


def check_run(contents: Contents, stated: TableSettings, *, path: str, deployed: bool) -> DataCheck | None:
    """Return the data check of a run; None at a real node, whose check stays with the people of the site.

    An error of the check is logged, and does not end the run.

    Args:
        contents: all rows of the run.
        stated: settings about columns.
        path: path as the user typed it.
        deployed: whether the run is at a real node.
    """
    if deployed:
        return None
    try:
        settings = check_settings(stated, path, is_sampled=True)
        if contents.images is not None:
            return check_images(contents, settings, source=Path(path).name)
        return check_data(
            TypedColumns(table=contents.table),
            settings,
            source=Path(path).name,
            clients_N=contents.clients,
            test_N=contents.test_N,
        )
    except Exception:
        log.exception("the data check failed")
        return None
