"""The scenario `folder`: learn from tables or images of the user.

Shapes: N rows or images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from fedlearn.advice import assignment
from fedlearn.data.contents import CLASS_COLUMN, Contents
from fedlearn.data.data_check.run_check import check_run
from fedlearn.data.digests import digests_of_images, digests_of_table
from fedlearn.data.encoding import declared_columns
from fedlearn.data.federated_statistics import Noise
from fedlearn.data.fit_encoding import EncodingResult, EncodingSettings, fit_encoding
from fedlearn.data.fit_images import fit_images
from fedlearn.data.folder import read_contents
from fedlearn.data.from_arrays import from_rows
from fedlearn.data.held_out_columns import HeldOutColumns, held_out_columns
from fedlearn.data.hugging_face import HUB_PREFIX, read_hub
from fedlearn.data.image_folders import ImageSettings
from fedlearn.data.inputs import ImageInputs, TableInputs, TextColumnInputs
from fedlearn.data.levels import to_categories, to_category
from fedlearn.data.partition import Natural, Partition, Time, as_partition, partition_rows
from fedlearn.data.preprocessing import Preprocessing, Target
from fedlearn.data.row_splits import held_out_table, leakage_note, split_contents, split_settings_of
from fedlearn.data.table_settings import TableSettings, as_items, table_settings
from fedlearn.data.tables import Table, drop_columns, to_numbers
from fedlearn.data.target_columns import declared_target, read_targets, target_names
from fedlearn.data.typed_tables import short_notes, type_table
from fedlearn.errors import DataError, SettingError, require
from fedlearn.loop.local_defaults import declares_local_defaults
from fedlearn.loop.scenario import Network, Scenario, declares_model
from simulations.models.text.readers import digest_of_base
from simulations.scenarios.folder_defaults import folder_defaults
from simulations.scenarios.folder_texts import (
    LENGTH,
    cut_note,
    declared_network_for,
    declared_text_inputs,
    network_for,
    text_inputs,
    trainer_for,
)
from simulations.scenarios.mask_folder import MaskSettings, mask_folder
from simulations.scenarios.token_folder import TASK as TOKENS
from simulations.scenarios.token_folder import TokenSettings, declared_tagger, token_folder


def declared_model(settings: Mapping[str, Any]) -> tuple[Preprocessing, Network] | None:
    """Return inputs, target and network that the settings alone determine, as at a coordinator without data.

    They are unknown for images, for numbers without scales, and without the classes or the task.
    """
    stated = table_settings(**{field.name: settings.get(field.name) for field in fields(TableSettings)})
    settings = dict(settings) | {field.name: getattr(stated, field.name) for field in fields(TableSettings)}
    if settings.get("task") == TOKENS:
        return declared_tagger(settings)
    target, found, model = settings.get("target"), declared_target(settings), settings.get("model")
    text, scales = settings.get("text"), settings.get("scales") or {}
    has_inputs = text is not None or settings.get("scale") == "constants"
    if target is None or not has_inputs or found is None:
        return None
    features = _without(scales, settings), _without(settings.get("categories") or {}, settings)
    (task, classes), label = found, ", ".join(target_names(target))
    centre, spread = map(float, scales.get(label, (0, 1))) if task.name == "regression" else (0.0, 1.0)
    inputs: TableInputs | TextColumnInputs
    if text is not None:
        inputs = declared_text_inputs(as_items(text), model, settings.get("text_length") or LENGTH)
    else:
        inputs = TableInputs(columns=declared_columns(*features, stated.formats))
    described = Target(name=label, task=task, classes=classes, centre=centre, spread=spread)
    return Preprocessing(inputs=inputs, target=described), declared_network_for(inputs, model)


def _without(columns: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    left_out = (*target_names(settings["target"]), settings.get("client"), *(settings.get("ignore") or ()))
    return {name: value for name, value in columns.items() if name not in left_out}


@declares_local_defaults(folder_defaults)
@declares_model(declared_model)
def folder(
    *,
    framework: str = "torch",
    model: Any = "mlp",
    partition: Partition | str = "natural",
    path: str | PathLike[str] | None = None,
    target: str | Sequence[str] | None = None,
    task: str | None = None,
    classes: Sequence[Any] | None = None,
    client: str | None = None,
    clients: Sequence[Any] | None = None,
    schema: str | None = None,
    ignore: Sequence[str] | None = None,
    text: str | Sequence[str] | None = None,
    text_length: int = LENGTH,
    scale: str = "federated",
    scales: Mapping[str, Sequence[float]] | None = None,
    categories: Mapping[str, Sequence[Any]] | None = None,
    bounds: Mapping[str, Sequence[float]] | None = None,
    noise_multiplier: float | None = None,
    image: str | None = None,
    image_size: int | None = None,
    image_channels: int | None = None,
    window: Sequence[float] | None = None,
    layout: str | None = None,
    skip_damaged: bool = False,
    split: str | None = None,
    validation: str | None = None,
    group: str | None = None,
    held_out_clients: Sequence[Any] | None = None,
    order_by: str | None = None,
    seed: int = 1,
    device: str = "cpu",
    deployed: bool = False,
) -> Scenario:
    """Train on the user's tables (CSV, TSV, Parquet) or images; `fedlearn.data.folder` describes the layout.

    ``path=hf://owner/name`` reads a data set of the Hugging Face Hub instead (`fedlearn.data.hugging_face`).

    A missing value is replaced by the centre of its column. With ``scale=federated`` the clients add up counts, sums
    and sums of squares of their training rows, and the header states this. `fedlearn.data.federated_statistics`
    describes the disclosure. Apart from the list of classes, no other statistic is computed from pooled data.

    A real node has only its own rows and takes no part in such a statistics round. A deployment therefore needs
    ``scale=constants``, ``classes`` and ``clients``.

    Args:
        framework: ``torch``, ``jax`` or ``mixed`` (even clients in torch, odd ones in JAX).
        model: ``mlp`` (32 hidden units), ``linear``, ``cnn`` (images), or a module.
        partition: ``natural`` (the clients in the data) or another kind; defaults: 10 clients, 2 classes per client,
            test share 0.25. Files named train and test determine the test set themselves.
        path: a file, a folder, or ``hf://owner/name``.
        target: column to predict, or a list of columns: time and event for ``survival``, one column per label for
            ``multilabel``. The target of an image is the name of its folder.
        task: ``binary``, ``multiclass``, ``regression``, ``survival`` or ``multilabel``; None infers it from one
            target column. ``segmentation`` reads images with masks, see `simulations.scenarios.mask_folder`.
            ``token_classification`` reads CoNLL files, see `simulations.scenarios.token_folder`.
        classes: all values of the target, in the order of their numbers; None takes the values in the data. For
            ``survival`` and ``multilabel``, the two values of an event or a label, first the value for no.
        client: column with the client of each row; None uses the names of files and folders.
        clients: names of all clients, in the order of their numbers; None takes the names in the data, sorted. If it is
            given, the folder may have the rows of some clients only, as at a real node.
        schema: YAML file that states the types, units, levels and roles of all columns; None detects the types. See
            `fedlearn.data.schema`.
        ignore: columns to leave out, e.g. patient numbers.
        text: column of text to learn from, or columns, instead of all others. The words of each column are hashed to
            4,096 features. A text model reads hashed tokens in order: ``cnn``, ``bilstm``, ``lstm``, ``gru`` or
            ``transformer``.
        text_length: tokens of a text or a sentence for a text model; longer ones are cut.
        scale: ``federated``, ``none``, or ``constants``: ``(value - centre) / spread`` with the numbers in ``scales``.
        scales: column -> (centre, spread), for ``constants``; also for the target of a regression.
        categories: column -> values; each value becomes a feature. With ``federated`` the statistics round counts the
            values of the other text columns.
        bounds: column -> (minimum, maximum) of its values, for ``noise_multiplier``.
        noise_multiplier: standard deviation of the Gaussian noise on each client's statistics, in units of the
            sensitivity to one row, > 0. It is booked in the ledger of ``privacy=example``, and each column needs bounds
            or categories. None adds no noise.
        image: column with the names of image files, for a folder of images and a table; None finds it.
        image_size: side of the scaled images, pixels; None keeps the size.
        image_channels: 1 (grey) or 3 (colour); None is colour if an image is in colour.
        window: (centre, width) in pixel values, e.g. (40, 400) for soft tissue in CT. The window becomes -1 to 1, and
            values outside are clipped. None takes the range of 8 or 16 bits.
        layout: meaning of each folder level, separated by ``/``: ``client``, ``class``, ``split``, ``group`` or ``*``.
            None infers it, and the header shows it.
        skip_damaged: whether images that cannot be read are left out and counted. If not, they are an error.
        split: column with the part of each row: ``train``, ``validation`` or ``test``, in any usual spelling.
        validation: use of the rows of a validation split: ``train``, ``test`` or ``none``. None is ``none`` beside a
            test split, and ``test`` without it.
        group: column with the group of each row, e.g. the patient. All rows of a group are in one part of the split.
            The hash of its name decides, so the part is the same at all clients.
        held_out_clients: clients that never train. All their rows are held out, and have an evaluation of their own.
        order_by: column by which ``partition=time`` and ``partition=feature`` sort the rows.
        seed: seed of the partition and of the test split.
        device: device for training, e.g. ``cpu`` or ``cuda``.
        deployed: True at a real node; the node sets it.

    Raises:
        SettingError: a setting is out of range or missing.
        DataError: the data cannot be read; the message names file, row and column.
        MissingExtra: Parquet or images need an optional dependency.
    """
    partition = as_partition(partition)
    stated = table_settings(
        schema=schema, target=target, task=task, classes=classes, client=client, clients=clients,
        ignore=ignore, text=text, order_by=order_by, scales=scales, categories=categories, bounds=bounds,
    )  # fmt: skip
    target, task, classes, client, clients = stated.target, stated.task, stated.classes, stated.client, stated.clients
    _require_settings(path, clients, partition, deployed=deployed)
    expected = "null at a node; a site that never trains can evaluate the trained model with the command predict"
    require(
        not (deployed and held_out_clients), "held_out_clients", held_out_clients, expected, "held_out_clients=null"
    )
    if task == "segmentation":
        mask_settings = MaskSettings(
            classes=classes,
            clients=clients,
            image_size=image_size,
            image_channels=image_channels,
            window=window,
            has_all_clients=not deployed,
        )
        place, build = Path(str(path)).expanduser(), {"model": model, "framework": framework, "device": device}
        return mask_folder(place, mask_settings, partition, seed=seed, **build)
    split_settings = split_settings_of(
        stated.schema, split=split, group=group, validation=validation, held_out_clients=held_out_clients or ()
    )
    if task == TOKENS:
        token_settings = TokenSettings(
            classes=classes,
            clients=clients,
            length=text_length,
            layout=layout,
            split=split_settings,
            columns={"target": target, "text": text, "client": client, "split": split, "group": group},
            has_all_clients=not deployed,
        )
        place, build = Path(str(path)).expanduser(), {"model": model, "framework": framework, "device": device}
        return token_folder(place, token_settings, partition, seed=seed, **build)
    noise = _noise(noise_multiplier, stated.bounds, stated.categories, seed)
    preparation = EncodingSettings(scale=scale, scales=stated.scales, categories=stated.categories, noise=noise)
    images = ImageSettings(
        size=image_size,
        channels=image_channels,
        skip_damaged=skip_damaged,
        layout=layout,
        clients=tuple(map(to_category, clients or ())),
        classes=tuple(map(to_category, classes or ())),
        file_column=image,
    )
    contents = _read(
        str(path), client_column=client, ignored_columns=stated.ignore, images=images, **_files(stated, str(path))
    )
    if contents.images is None or CLASS_COLUMN not in contents.table.columns:
        stated.require_names(contents.table, has_all_files=not deployed)
        reading = replace(stated.reading, texts=[*stated.reading.texts, *split_settings.columns])
        contents = replace(contents, table=type_table(contents.table, reading))
    data_check = check_run(contents, stated, path=str(path), deployed=deployed)
    names, natural_N = owners_of(contents, clients)
    whole = not deployed and len(np.unique(natural_N)) == len(names)
    targets = read_targets(contents.table, _label(contents, target), task=task, classes=classes, has_all_clients=whole)
    label, y_N, kind = targets.label, targets.y, targets.task
    strata_N = kind.strata(y_N)
    rows = rows_of(partition, contents, strata_N, natural_N, names=names, order_by=order_by, seed=seed)
    client_names = names if isinstance(partition, Natural) else ()
    options: dict[str, Any] = {"test_share": partition.held_out_share, "seed": seed}
    parts = split_contents(contents, rows, strata_N, split_settings, names=client_names, **options)
    train, test = parts.train, parts.test
    roles = stated.schema.roles if stated.schema is not None else ()
    left_out = (
        *targets.names,
        *split_settings.columns,
        client,
        order_by if isinstance(partition, Time) else None,
        *roles,
    )
    columns = drop_columns(contents.table, [name for name in left_out if name])
    scaled = {} if contents.images is not None or text is not None else dict(columns.columns)
    if kind.name == "regression" and (scale == "federated" or label in preparation.scales):
        scaled[label] = contents.table.columns[label]
    fitted_encoding = (
        fit_encoding(replace(contents.table, columns=scaled), train, preparation, has_all_clients=whole)
        if scaled
        else EncodingResult()
    )
    inputs, description = _inputs(
        contents, columns, text, fitted_encoding, window, model=model, text_length=text_length
    )
    x = _features(contents, columns, inputs, fitted_encoding)
    centre, spread = fitted_encoding.scale(label)
    if label in scaled:
        y_N, description = (y_N - centre) / spread, f"{description}, target: minus {centre:.6g}, over {spread:.6g}"
    leaks = leakage_note(contents.images, parts) if contents.images is not None else ()
    notes = (*contents.notes, *parts.notes, *leaks, cut_note(inputs, columns))
    data = replace(
        from_rows(x, y_N, train=train, test=test, task=kind),
        num_classes=len(targets.classes) or 1,
        names=dict(enumerate(client_names)),
        source=" · ".join(filter(None, (Path(str(path)).name, *notes, *short_notes(contents.table), description))),
    )
    data = data if deployed else data.hold_out(parts.held_out_clients)
    fitted, line = trainer_for(inputs, model, data, framework=framework, device=device)
    return Scenario(
        name="folder",
        data=data,
        trainer=fitted,
        model=line,
        partition=str(partition),
        disclosure=fitted_encoding.disclosure,
        ledger=fitted_encoding.ledger,
        preprocessing=Preprocessing(
            inputs=inputs, target=Target(name=label, task=kind, classes=targets.classes, centre=centre, spread=spread)
        ),
        network=network_for(inputs, model),
        base_digest=digest_of_base(model),
        data_digests=_digests(contents),
        held_out_table=held_out_table(contents.table, test, client_names),
        held_out_columns=_held_out_columns(contents, test, str(path), client, ignore or ()),
        data_check=data_check,
    )


def _held_out_columns(
    contents: Contents, test: Sequence[np.ndarray], path: str, client: str | None, ignore: Sequence[str]
) -> HeldOutColumns | None:
    if contents.images is not None:
        return None

    def read_table(left_out: Sequence[str]) -> Table:
        return _read(path, client_column=client, ignored_columns=[name for name in left_out if name != client]).table

    return held_out_columns(read_table, [*contents.table.columns, *ignore], test, len(contents.table))


def _require_settings(path: Any, clients: Sequence[Any] | None, partition: Partition, *, deployed: bool) -> None:
    require(path is not None, "path", path, "a CSV or Parquet file, or a folder", "path=my_data")
    is_fixed = not deployed or (clients is not None and isinstance(partition, Natural))
    expected = "the names of all clients, in the order of their numbers; a deployment requires them"
    require(is_fixed, "clients", clients, expected, "'scenario.clients=[north,south]' partition=natural")


def _files(stated: TableSettings, path: str) -> dict[str, Any]:
    """Return the statements of a schema about files on this machine."""
    return {} if stated.schema is None or path.startswith(HUB_PREFIX) else {"schema": stated.schema}


def _read(path: str, **options: Any) -> Contents:
    return (
        read_hub(path, **options) if path.startswith(HUB_PREFIX) else read_contents(Path(path).expanduser(), **options)
    )


def read_path(path: str, client_column: str | None) -> Contents:
    """Return the rows of a file, of a folder, or of a data set of the Hub."""
    return _read(path, client_column=client_column)


def owners_of(contents: Contents, clients: Sequence[Any] | None) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the names of all clients in the order of their numbers, and the client number of each row."""
    if contents.clients is None:
        has_no_names = clients is None
        require(
            has_no_names,
            "clients",
            clients,
            "null, because no column or file name identifies the client of a row",
            "clients=null",
        )
        return (), np.zeros(0, np.int64)
    here, natural_N = np.unique(contents.clients.astype(str), return_inverse=True)
    names = tuple(here.tolist()) if clients is None else tuple(to_category(name) for name in clients)
    if unknown := [name for name in here.tolist() if name not in names]:
        fix = assignment("scenario.clients", [*names, *unknown])
        raise SettingError("clients", list(names), f"all clients of the folder, including {unknown[0]}", fix)
    number_of = np.array([names.index(name) for name in here.tolist()])
    return names, number_of[natural_N]


def _label(contents: Contents, target: str | Sequence[str] | None) -> str | Sequence[str]:
    if contents.images is not None and target is None and CLASS_COLUMN in contents.table.columns:
        return CLASS_COLUMN
    if target is None:
        columns = list(contents.table.columns)
        raise SettingError(
            "target", target, f"the column to predict, one of {', '.join(columns)}", assignment("target", columns[-1])
        )
    return target


def rows_of(
    partition: Partition,
    contents: Contents,
    y_N: np.ndarray,
    natural_N: np.ndarray,
    *,
    names: Sequence[str],
    order_by: str | None,
    seed: int,
) -> list[np.ndarray]:
    """Return the rows of each client. A client at another node has none."""
    if isinstance(partition, Natural):
        reading = f" ({contents.notes[0]})" if contents.notes else ""
        expected = f"iid, dirichlet or another kind, because these data have no natural clients{reading}"
        fix = "partition=iid"
        require(bool(names), "partition", partition, expected, fix)
        partition.require_num_clients(len(names))
        return [np.flatnonzero(natural_N == number) for number in range(len(names))]
    order_N = None
    if order_by is not None:
        cells_N = contents.table.column(order_by, "scenario.order_by")
        missing_N = np.array([cell is None for cell in to_categories(cells_N)])
        contents.table.refuse(missing_N, order_by, "missing, but rows are ordered by it", "write a value in this cell")
        values_N, wrong_N = to_numbers(cells_N)
        # text is sorted alphabetically, which is correct for ISO dates such as 2026-01-31
        order_N = np.unique(cells_N.astype(str), return_inverse=True)[1] if wrong_N.any() else values_N
    return partition_rows(partition, y_N, natural_N if names else None, order_N=order_N, seed=seed)


def _noise(
    multiplier: float | None,
    bounds: Mapping[str, Sequence[float]] | None,
    categories: Mapping[str, Sequence[Any]] | None,
    seed: int,
) -> Noise | None:
    if multiplier is None:
        return None
    for name, pair in (bounds or {}).items():
        is_pair = isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2
        require(is_pair, f"bounds.{name}", pair, "two numbers, the smaller first", f"'bounds={{{name}:[0,1]}}'")
    pairs = {name: (pair[0], pair[1]) for name, pair in (bounds or {}).items()}
    known = {name: tuple(map(to_category, values)) for name, values in (categories or {}).items()}
    return Noise(multiplier=multiplier, bounds=pairs, categories=known, seed=seed)


def _inputs(
    contents: Contents,
    columns: Table,
    text: str | Sequence[str] | None,
    fitted: EncodingResult,
    window: Sequence[float] | None,
    *,
    model: Any,
    text_length: int,
) -> tuple[TableInputs | TextColumnInputs | ImageInputs, str]:
    """Return the inputs, and their description for the header."""
    if contents.images is not None:
        return fit_images(contents.images, window)
    require(window is None, "window", window, "null, because these data have no images", "window=null")
    if text is not None:
        for name in as_items(text):
            columns.column(name, "scenario.text")
        return text_inputs(as_items(text), model, text_length)
    if not columns.columns:
        raise DataError("scenario.ignore leaves out all columns\n  try       'scenario.ignore=[]'")
    encoded = tuple(column for column in fitted.columns if column.name in columns.columns)
    return TableInputs(columns=encoded), fitted.summary


def _features(
    contents: Contents, columns: Table, inputs: TableInputs | TextColumnInputs | ImageInputs, fitted: EncodingResult
) -> np.ndarray:
    """Return the model inputs of all rows."""
    if isinstance(inputs, ImageInputs):
        assert contents.images is not None
        return inputs.normalize(contents.images)
    fix = "list all values of the column in scenario.categories"
    return inputs.transform(columns, allow_unknown=fitted.allow_unknown, unknown_fix=fix)


def _digests(contents: Contents) -> Mapping[str, str]:
    """Return digests of the rows of each file and column, or of the pixels and the class of each image."""
    if contents.images is None:
        return digests_of_table(contents.table)
    return digests_of_images(contents.table, contents.images)
