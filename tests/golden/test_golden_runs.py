"""Runs whose end is known: a change here means that published results can no longer be had again.

The NumPy trainer is used, so that no framework's arithmetic is in the numbers; parameters are compared to six digits,
since the last one belongs to the processor.
"""

from inspect import signature

import numpy as np
import pytest

import strategies
from fedlearn import LocalSettings, Schedule, federate, serial, start
from fedlearn.testing import LinearTrainer, linear_problem

# classes, a hidden layer, adapters: this is a linear regression
NEED_MORE = {"feddecorr", "fedgkd", "fedlc", "fedntd", "flora", "moon"}
GOLDEN = {
    "afl": [-0.0405951, 1.0035181, 1.3789786, 1.0321712],
    "apfl": [-0.0158047, 0.9122686, 1.3967879, 0.8674117],
    "bucketing": [0.021779, 0.8737077, 1.217791, 0.8263842],
    "bulyan": [0.0034363, 0.9127325, 1.2995584, 0.8978847],
    "centered_clipping": [0.003457, 0.9129077, 1.2994224, 0.8977301],
    "diloco": [0.0292998, 0.9154868, 1.2646546, 0.8308136],
    "ditto": [-0.0158047, 0.9122686, 1.3967879, 0.8674117],
    "fcf": [0.0136504, 0.8346391, -0.0644955, 0.8290019],
    "fedadagrad": [0.0039588, 0.8072302, 0.071361, 0.8252558],
    "fedadam": [-0.0361343, 0.6721762, -0.2361612, 0.6791747],
    "fedala": [0.019334, 0.9439887, 1.3573759, 0.9325251],
    "fedamp": [0.0110566, 0.9855936, 1.1716869, 0.9039605],
    "fedasync": [0.0608357, 1.1066418, 0.543004, 0.8412723],
    "fedavg": [-0.0158047, 0.9122686, 1.3967879, 0.8674117],
    "fedavgm": [0.074867, 1.0839438, 2.1424441, 0.7858396],
    "fedbn": [0.0136504, 0.9078064, 1.4046357, 0.8687826],
    "fedbuff": [-0.0145561, 0.8108622, 1.1553053, 0.9169139],
    "fedcm": [-0.0317749, 1.1423781, 2.0468061, 1.0145006],
    "feddyn": [0.0087262, 0.9391302, 1.2863016, 0.8445237],
    "fedexp": [0.0009039, 0.9658377, 1.4460135, 0.9625041],
    "fedit": [-0.0158047, 0.9122686, 1.3967879, 0.8674117],
    "fedmedian": [0.00322, 0.8451567, 1.2574214, 0.862988],
    "fednova": [-0.0035289, 0.9264256, 1.3411279, 0.8958079],
    "fedper": [0.0136504, 0.9078064, 1.4046357, 0.8687826],
    "fedprox": [-0.0155408, 0.9120352, 1.3929322, 0.8655255],
    "fedrep": [0.0136504, 0.9015414, 1.4142436, 0.8433957],
    "fedsa_lora": [0.0136504, 0.9078063, 1.4046357, 0.8687826],
    "fedsam": [-0.0175676, 0.9122012, 1.4121097, 0.8624308],
    "fedspeed": [0.0098772, 0.9739472, 2.3603621, 1.1048357],
    "fedtrimmedavg": [0.0034363, 0.9127325, 1.2995584, 0.8978847],
    "fedyogi": [-0.0357478, 0.6701317, -0.2382706, 0.6770204],
    "ffa_lora": [0.0136504, 0.9173453, 1.3877897, 0.8712252],
    "fltrust": [0.0585267, 0.9473521, 0.4310557, 0.7493553],
    "ifca": [-0.0158047, 0.9122686, 1.3967879, 0.8674117],
    "krum": [0.0347877, 0.9453849, 1.2444564, 0.701274],
    "nnm": [0.0213825, 0.8530277, 1.2452486, 0.8262782],
    "norm_bounding": [0.003477, 0.9130248, 1.2993205, 0.8976541],
    "oort": [-0.0130929, 0.9799333, 1.3473095, 0.9973719],
    "pfedme": [0.0069185, 0.9080061, 1.2625293, 0.8877344],
    "power_of_choice": [-0.0335794, 1.238493, 1.0705248, 1.0573941],
    "proxskip": [0.0030231, 0.9792568, 1.1809188, 0.8897378],
    "qfedavg": [-0.0053979, 0.8515657, 0.8796031, 0.8064224],
    "rfa": [0.0208083, 0.8920325, 1.2283962, 0.8259455],
    "scaffold": [-0.0231031, 0.9352968, 1.1549395, 0.8435597],
    "signsgd": [0.0136504, 0.6201506, -0.3108892, 0.6180556],
}


@pytest.mark.parametrize("name", [name for name in strategies.__all__ if name not in NEED_MORE])
def test_a_golden_run_ends_where_it_always_did(name):
    trainer = LinearTrainer(3)
    engine = serial(linear_problem(), trainer)
    builder = getattr(strategies, name)
    settings = {"clients_per_round": 4, "personal_parameters": "out.bias", "frozen_parameters": "out.bias"}
    taken = settings.keys() & signature(builder).parameters.keys()
    strategy = builder(**{setting: settings[setting] for setting in taken})
    state = start(strategy, trainer.init(1), engine, seed=1)
    epochs = 2 if strategy.local.num_steps is None else 1
    local = LocalSettings(epochs=epochs, batch_size=4, learning_rate=0.05)
    for done in federate(strategy, engine, state, schedule=Schedule(rounds=10), local=local):
        state = done.state
    assert np.allclose(state.params_D, GOLDEN[name], rtol=0, atol=2e-6), state.params_D.tolist()
