"""A mean keeps one sum and one update per process, and its bits do not depend on processes and blocks."""

import os
import subprocess
import sys
from dataclasses import replace
from inspect import signature

import numpy as np
import pytest

import strategies
from fedlearn import LocalSettings, Schedule, federate, start
from fedlearn.algorithm.transforms import clip
from fedlearn.compression.codecs import half
from fedlearn.core import Layout
from fedlearn.engines.base import InProcessEngine
from fedlearn.engines.process_pool import ProcessPool
from fedlearn.testing import LinearTrainer, linear_problem
from fedlearn.testing.aggregation import some_updates

pytestmark = pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
NEED_ALL_UPDATES = {
    "bucketing",
    "bulyan",
    "centered_clipping",
    "fedamp",
    "fedmedian",
    "fedtrimmedavg",
    "flora",
    "fltrust",
    "ifca",
    "krum",
    "nnm",
    "rfa",
}
SETTINGS = {"clients_per_round": 4, "personal_parameters": "out.bias"}


def built(name):
    builder = getattr(strategies, name)
    return builder(**{key: SETTINGS[key] for key in SETTINGS.keys() & signature(builder).parameters.keys()})


def numbers_in(value):
    """Return the number of numbers in a partial state."""
    if isinstance(value, dict):
        return sum(map(numbers_in, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(numbers_in, value))
    return numbers_in(value.delta_KD) if hasattr(value, "delta_KD") else np.size(value)


def size_after(strategy, num_blocks):
    aggregator, partial = strategy.aggregate, strategy.aggregate.init(Layout.from_shapes([("w", (8,))]))
    for seed in range(num_blocks):
        partial = aggregator.add(partial, some_updates(strategy, seed=seed))
    return numbers_in(partial)


def test_all_aggregators_but_the_rules_over_all_updates_stream():
    grows = {name for name in strategies.__all__ if size_after(built(name), 5) > size_after(built(name), 1)}
    assert grows == NEED_ALL_UPDATES


def run(strategy, *, num_processes=None, block_size=1, trainer=None, rounds=3):
    """Return the final model, the client states, the metrics and the failures of a run."""
    data, trainer = linear_problem(), trainer or LinearTrainer(3)
    pool = ProcessPool(trainer, data, num_processes=num_processes, block_size=block_size) if num_processes else None
    engine = InProcessEngine(data, trainer, block_size=block_size, pool=pool)
    state, done = start(strategy, trainer.init(1), engine, seed=1), []
    for each in federate(strategy, engine, state, schedule=Schedule(rounds=rounds), local=LocalSettings(batch_size=4)):
        done.append(each)
    engine.close()
    states = {(client, name): v for client, state in engine.client_states.items() for name, v in state.items()}
    return done[-1].state.params_D, states, [each.metrics for each in done], [each.failures for each in done]


STRATEGIES = {
    "mean": strategies.fedavg(),
    "client states": strategies.scaffold(),
    "personal model": strategies.ditto(),
    "mixed rounds": strategies.fedbuff(),
    "rule over all updates": strategies.krum(),
    "clipped": replace(strategies.fedavg(), stages=(clip(0.1),)),
    "compressed": replace(strategies.fedavg(), stages=(half(),)),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_processes_and_blocks_do_not_change_a_bit(name, monkeypatch):
    monkeypatch.setattr("fedlearn.engines.shared_arrays.MIN_SHARED_BYTES", 0)
    model_D, states, metrics, _ = run(STRATEGIES[name])
    for num_processes, block_size in [(1, 1), (3, 1), (2, 4)]:
        other_D, other_states, other_metrics, failures = run(
            STRATEGIES[name], num_processes=num_processes, block_size=block_size
        )
        assert np.array_equal(other_D, model_D)
        assert states.keys() == other_states.keys()
        assert all(np.array_equal(states[key], other_states[key]) for key in states)
        assert all(a == pytest.approx(b) for a, b in zip(metrics, other_metrics, strict=True))
        assert not any(failures)


class Faulty(LinearTrainer):
    """Fails for client 1, and kills each process that trains client 4 but the first one."""

    def __init__(self, num_features):
        super().__init__(num_features)
        self.home = os.getpid()

    def fit(self, request, rule, work):
        if any(item.client == 1 for item in work):
            raise ValueError("no")
        if any(item.client == 4 for item in work) and os.getpid() != self.home:
            os._exit(9)
        return super().fit(request, rule, work)


def test_a_dead_process_costs_no_update_and_a_failing_client_only_its_own():
    expected_D, _, _, failures = run(strategies.fedavg(), trainer=Faulty(3), rounds=1)
    model_D, _, _, same = run(strategies.fedavg(), trainer=Faulty(3), rounds=1, num_processes=2)
    assert np.array_equal(model_D, expected_D)
    names = [[(item.client, item.stage, item.reason) for item in each] for each in (*failures, *same)]
    assert names == [[(1, "fit", "ValueError: no")]] * 2


MEMORY = """
from pathlib import Path
import numpy as np
import strategies
from fedlearn import LocalSettings, Schedule, federate, start
from fedlearn.core import Layout, Updates
from fedlearn.engines.base import InProcessEngine
from fedlearn.engines.process_pool import ProcessPool
from fedlearn.testing import LinearTrainer, linear_problem

class Large(LinearTrainer):
    def __init__(self):
        super().__init__(3)
        self.layout = Layout.from_shapes([("w", ({num_parameters},))])

    def fit(self, request, rule, work):
        ones_K = np.ones(len(work), np.int64)
        delta_KD = np.full((len(work), {num_parameters}), 0.5, np.float32)
        clients_K = np.array([item.client for item in work])
        return Updates(clients_K=clients_K, delta_KD=delta_KD, num_examples_K=ones_K, num_steps_K=ones_K)

data, trainer = linear_problem(num_clients={num_clients}), Large()
pool = ProcessPool(trainer, data, num_processes={num_processes})
engine = InProcessEngine(data, trainer, block_size=1, pool=pool)
state = start(strategies.fedavg(), np.zeros({num_parameters}, np.float32), engine, seed=1)
largest, each_fit = 0, engine.fit

def watched(*arguments):
    global largest
    for result in each_fit(*arguments):
        yield result
        del result
        for process in ("self", *(process.pid for process in pool.processes)):
            text = Path(f"/proc/{{process}}/smaps_rollup").read_text()
            sizes[process] = int(next(line for line in text.splitlines() if line.startswith("Pss:")).split()[1])
        largest = max(largest, sum(sizes.values()))

sizes, engine.fit = {{}}, watched
next(federate(strategies.fedavg(), engine, state, schedule=Schedule(rounds=1), local=LocalSettings()))
engine.close()
print(largest * 1024)
"""


def peak_bytes(**values):
    """Return the largest memory of all processes while updates arrive."""
    code = MEMORY.format(**values)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


@pytest.mark.slow
def test_memory_of_a_mean_does_not_grow_with_the_cohort():
    size = 5_000_000  # parameters, 20 MB
    few, many = (peak_bytes(num_parameters=size, num_clients=n, num_processes=2) for n in (6, 48))
    assert many < few + 2 * 4 * size, "48 updates have 960 MB"
    small = peak_bytes(num_parameters=1000, num_clients=6, num_processes=2)
    # start parameters, shared model, sum; per process its update, two copies in memory that is shared or free
    assert many < small + (2 + 2 + 3 * (2 + 1)) * 4 * size + 2**26
