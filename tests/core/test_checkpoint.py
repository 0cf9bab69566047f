import json
import os
from dataclasses import replace

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save as to_safetensors

from fedlearn import Layout
from fedlearn.core import Request, ServerState, checkpoint
from fedlearn.core.records import InFlight
from fedlearn.errors import CheckpointError

LAYOUT = Layout.from_shapes([("w", (4,))])


def state_of(round):
    rng = np.random.default_rng(round)
    return ServerState(
        round=round,
        seed=7,
        params_D=rng.normal(size=4).astype(np.float32),
        server={"m": rng.normal(size=4).astype(np.float32), "count": np.float64(0.1)},
        stages=({}, {"norm": np.array([1.5])}),
    )


MEMORIES = {9: {"own": np.arange(4, dtype=np.float32)}, 2: {"own": -np.ones(4, np.float32)}}


def test_what_is_saved_comes_back_bit_for_bit(tmp_path):
    saved = state_of(3)
    state, memories = checkpoint.load(checkpoint.save(tmp_path, saved, MEMORIES, layout=LAYOUT), LAYOUT)
    assert (state.round, state.seed) == (3, 7)
    assert state.params_D.tobytes() == saved.params_D.tobytes()
    assert {name: v.tobytes() for name, v in state.server.items()} == {
        name: np.asarray(v).tobytes() for name, v in saved.server.items()
    }
    assert state.stages[0] == {}
    assert state.stages[1]["norm"].tolist() == [1.5]
    assert sorted(memories) == [2, 9]
    assert all(np.array_equal(memories[k]["own"], MEMORIES[k]["own"]) for k in (2, 9))


def test_only_the_newest_are_kept(tmp_path):
    for round in (1, 2, 10, 9):
        checkpoint.save(tmp_path, state_of(round), {}, layout=LAYOUT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round_000009.safetensors", "round_000010.safetensors"]
    assert checkpoint.load_latest(tmp_path, LAYOUT)[0].round == 10


@pytest.mark.parametrize("damage", ["cut off", "one bit", "empty", "no header"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, damage):
    checkpoint.save(tmp_path, state_of(1), {}, layout=LAYOUT)
    path = checkpoint.save(tmp_path, state_of(2), {}, layout=LAYOUT)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    spoilt = {"cut off": content[:-5], "one bit": content, "empty": b"", "no header": b"\0" * 64}[damage]
    path.write_bytes(spoilt)
    state, _, passed_over = checkpoint.load_latest(tmp_path, LAYOUT)
    assert state.round == 1
    assert len(passed_over) == 1
    assert path.name in passed_over[0]


def test_no_usable_checkpoint_is_an_error_that_says_what_was_found(tmp_path):
    with pytest.raises(CheckpointError, match="the folder has no checkpoint"):
        checkpoint.load_latest(tmp_path, LAYOUT)
    path = checkpoint.save(tmp_path, state_of(1), {}, layout=LAYOUT)
    path.write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match=path.name):
        checkpoint.load_latest(tmp_path, LAYOUT)


def rewrite_version(path, version):
    """Rewrite the header of a checkpoint with the version of an earlier fedlearn."""
    with safe_open(path, framework="numpy") as file:
        facts = json.loads(file.metadata()["fedlearn"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    path.write_bytes(to_safetensors(tensors, metadata={"fedlearn": json.dumps({**facts, "version": version})}))


@pytest.mark.parametrize("version", [1, 3, 4])
def test_a_checkpoint_of_an_earlier_version_is_refused_with_what_to_try(tmp_path, version):
    checkpoint.save(tmp_path, state_of(1), {}, layout=LAYOUT)
    path = checkpoint.save(tmp_path, state_of(2), {}, layout=LAYOUT)
    rewrite_version(path, version)
    reason = (
        rf"(?s)cannot read .*{path.name}.* not {version}\n  advice    resume with the version .*, or start a new run"
    )
    for read in (lambda: checkpoint.load(path, LAYOUT), lambda: checkpoint.load_latest(tmp_path, LAYOUT)):
        with pytest.raises(CheckpointError, match=reason):
            read()


def test_a_folder_of_this_version_passes_the_check_with_a_damaged_checkpoint_too(tmp_path):
    checkpoint.check_format(tmp_path / "none")
    checkpoint.save(tmp_path, state_of(1), {}, layout=LAYOUT)
    checkpoint.save(tmp_path, state_of(2), {}, layout=LAYOUT).write_bytes(b"cut")
    checkpoint.check_format(tmp_path)


def test_requests_that_are_under_way_come_back_with_the_clock(tmp_path):
    request = Request(round=2, seed=7, params_D=np.arange(4, dtype=np.float32), clock=1.5)
    saved = replace(state_of(3), clock=2.5, in_flight=(InFlight(client=9, request=request),))
    path = checkpoint.save(tmp_path, saved, {}, layout=LAYOUT)
    with safe_open(path, framework="numpy") as file:
        assert {"in_flight/client", "in_flight/round", "in_flight/clock"} <= set(file.keys())
    state, _ = checkpoint.load(path, LAYOUT)
    (item,) = state.in_flight
    assert (state.clock, item.client, item.request.round, item.request.clock) == (2.5, 9, 2, 1.5)
    assert np.array_equal(item.request.params_D, request.params_D)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    path = checkpoint.save(tmp_path, state_of(1), {}, layout=LAYOUT)
    with pytest.raises(CheckpointError, match="other parameters"):
        checkpoint.load(path, Layout.from_shapes([("v", (4,))]))


def test_a_write_that_fails_leaves_the_old_file_and_no_draft(tmp_path, monkeypatch):
    path = tmp_path / "file"
    checkpoint.write_atomically(path, b"old")

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
