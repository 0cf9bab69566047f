"""Build the callbacks of a run from the group ``callbacks``."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from fedlearn.advice import assignment
from fedlearn.callbacks.base import Callback
from fedlearn.callbacks.checkpoints import Checkpoints
from fedlearn.callbacks.run_files import RunFiles
from fedlearn.errors import SettingError, require
from fedlearn.runner.builders import check_targets, find_target
from fedlearn.runner.compose import CONF_DIR
from fedlearn.runner.instantiation import allowed_modules, build
from fedlearn.runner.run_config import REFERENCE

CALLBACKS = "callbacks"


class Required(NamedTuple):
    """Default callback that a run requires: it cannot be removed, replaced or added a second time."""

    kind: type[Callback]
    reason: str
    fix: str


REQUIRED: Mapping[str, Required] = {
    "files": Required(
        RunFiles,
        "without its files, a run cannot be resumed, reported or compared",
        "callbacks.console=null",
    ),
    "checkpoints": Required(
        Checkpoints,
        "without checkpoints, a run cannot be resumed, and predict and export have no model",
        "callbacks.checkpoints.keep=1",
    ),
}
FIRST, LAST = ("console", "report", "files", "early_stop"), ("checkpoints",)


def build_callbacks(cfg: DictConfig, extra: Mapping[str, Callback] = MappingProxyType({})) -> dict[str, Callback]:
    """Return the callbacks in the order of their calls. Callbacks of users come before the checkpoints.

    Args:
        cfg: all settings. Without the group ``callbacks``, only the default callbacks are built.
        extra: callbacks of a Python program by name; default none.

    Raises:
        SettingError: a required callback is missing, or a callback is refused. Its class may have a wrong base class,
            its module may not be allowed, or one of its settings may be wrong.
        BuildError: the constructor of a callback failed.
    """
    if CALLBACKS not in cfg:
        cfg = OmegaConf.merge(cfg, {CALLBACKS: default_callbacks()})  # type: ignore[assignment]
    raw: Any = cfg[CALLBACKS]
    if not OmegaConf.is_dict(raw):
        expected = "a group of callbacks; a list of option files is possible only with the configuration in conf/"
        raise SettingError(CALLBACKS, raw, expected, "+callbacks.mine._target_=my_code.MyTracker")
    raw = OmegaConf.to_container(raw, resolve=False)
    for name in REQUIRED:
        _require_present(name, raw)
    active = [name for name, node in raw.items() if node is not None]
    _refuse_second_values(cfg)
    found = {**{name: _build(name, cfg, raw) for name in active}, **extra}
    return {name: found[name] for name in sorted(found, key=_position)}


def default_callbacks() -> dict[str, Any]:
    """Return the settings of the default callbacks. References to other settings stay unresolved."""
    return _options(CONF_DIR / CALLBACKS / "default.yaml")


def references(node: Mapping[str, Any]) -> dict[str, str]:
    """Return key -> setting, for each key of a callback whose value refers to another setting."""
    matches = {key: REFERENCE.fullmatch(value) for key, value in node.items() if isinstance(value, str)}
    return {key: match[1] for key, match in matches.items() if match}


def _options(path: Any) -> dict[str, Any]:
    options = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    assert isinstance(options, dict)
    return {str(key): value for key, value in options.items()}


def _position(name: str) -> int:
    return FIRST.index(name) if name in FIRST else len(FIRST) + (name in LAST)


def _require_present(name: str, raw: Mapping[str, Any]) -> None:
    required, node = REQUIRED[name], raw.get(name)
    target = f"{required.kind.__module__}.{required.kind.__qualname__}"
    setting, value = f"{CALLBACKS}.{name}", node
    if isinstance(node, dict):
        setting, value = f"{setting}._target_", node.get("_target_")
    expected = f"{target}: {required.reason}"
    require(value == target, setting, "null" if value is None else value, expected, required.fix)


def _refuse_second_values(cfg: DictConfig) -> None:
    """Refuse a value of ``callbacks.NAME.KEY`` that differs from the setting to which the option file refers.

    Each value has one setting, so that two settings cannot disagree.
    """
    for path in sorted((CONF_DIR / CALLBACKS).glob("*.yaml")):
        for name, node in _options(path).items():
            for key, setting in references(node).items():
                current = OmegaConf.select(cfg, f"{CALLBACKS}.{name}")
                if OmegaConf.is_dict(current) and key in current:
                    value = str(current[key]).lower() if isinstance(current[key], bool) else current[key]
                    fix = assignment(setting, current[key])
                    other = OmegaConf.select(cfg, setting)
                    same = current[key] == other or (current[key] != current[key] and other != other)  # NaN
                    require(same, f"{CALLBACKS}.{name}.{key}", value, f"no value here: the setting is {setting}", fix)


def _build(name: str, cfg: DictConfig, raw: Mapping[str, Any]) -> Callback:
    where, node = f"{CALLBACKS}.{name}", raw[name]
    if not isinstance(node, dict) or "_target_" not in node:
        expected = "a mapping with _target_, under the name of the callback in the option file"
        raise SettingError(where, node, expected, f"+{CALLBACKS}.mine._target_=my_code.MyTracker")
    allow = allowed_modules(cfg)
    check_targets(OmegaConf.to_container(cfg[CALLBACKS][name], resolve=True), where, allow=allow, num_args=0)
    kind = find_target(node["_target_"], where)
    is_second = any(kind is required.kind and name != first for first, required in REQUIRED.items())
    expected = "another callback: a second callback of this class would write the same files"
    require(not is_second, f"{where}._target_", node["_target_"], expected, f"{where}=null")
    if not (isinstance(kind, type) and issubclass(kind, Callback)):
        expected = f"a subclass of fedlearn.callbacks.Callback, but it is {kind!r}"
        raise SettingError(f"{where}._target_", node["_target_"], expected, f"class {_class_name(node)}(Callback): ...")
    try:
        callback = build(cfg[CALLBACKS][name], where, allow=allow)
    except SettingError as error:
        raise _as_typed(error, name, references(node)) from None
    if not isinstance(callback, Callback):  # possible with _partial_ or __new__
        expected = "an instance of fedlearn.callbacks.Callback"
        raise SettingError(where, node, expected, f"{where}=null")
    return callback


def _class_name(node: Mapping[str, Any]) -> str:
    return str(node["_target_"]).rpartition(".")[2]


def _as_typed(error: SettingError, name: str, known: Mapping[str, str]) -> SettingError:
    """Return the error with the setting as the user types it: ``checkpoint_every``, not ``every``."""
    key = error.setting.removeprefix(f"{CALLBACKS}.{name}.")
    setting = known.get(key) or (key if key in known.values() else error.setting)
    fix = error.fix.replace(error.setting, setting).replace(f"{CALLBACKS}.{name}.{setting}", setting)
    return SettingError(setting, error.value, error.expected, fix)
