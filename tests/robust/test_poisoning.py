"""Poisonings send the updates that their papers define, and stay within the stated distance of honest updates."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlearn import Examples, LocalSettings, Schedule, SettingError, federate, serial, start
from fedlearn.engines.byzantine import ByzantineEngine
from fedlearn.robust import poisoning
from fedlearn.robust.poisoning import AttackView, draw_malicious_clients, poison_data
from fedlearn.testing import LinearTrainer, linear_problem
from strategies import fedavg, krum


def scene(seed=0, *, honest=9, malicious=3, size=6, round=1):
    rng = np.random.default_rng(seed)
    return AttackView(
        honest_HD=rng.normal(1, rng.random(size), (honest, size)),
        malicious_FD=rng.normal(size=(malicious, size)),
        round=round,
        seed=1,
    )


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), direction=st.sampled_from(poisoning.DIRECTIONS), honest=st.integers(2, 12))
def test_min_max_and_min_sum_go_as_far_as_they_may_and_no_further(seed, direction, honest):
    seen = scene(seed, honest=honest)
    apart_HH = np.linalg.norm(seen.honest_HD[:, None] - seen.honest_HD, axis=-1)
    far_D = poisoning.min_max(direction=direction).forge(seen)
    assert np.linalg.norm(far_D - seen.honest_HD, axis=1).max() == pytest.approx(apart_HH.max(), rel=1e-6)
    far_D = poisoning.min_sum(direction=direction).forge(seen)
    assert ((far_D - seen.honest_HD) ** 2).sum() == pytest.approx((apart_HH**2).sum(axis=1).max(), rel=1e-6)


def test_simple_attacks_send_what_they_say():
    seen = scene()
    assert np.array_equal(poisoning.sign_flip(scale=2.0).forge(seen), -2 * seen.malicious_FD)
    assert np.allclose(poisoning.inner_product(epsilon=0.5).forge(seen), -0.5 * seen.honest_HD.mean(0))
    assert np.allclose(poisoning.backdoor().forge(seen), 4 * seen.malicious_FD)
    noise_FD = poisoning.gaussian(std=3.0).forge(scene(size=10_000))
    assert noise_FD.std() == pytest.approx(3, rel=0.03)
    assert np.array_equal(noise_FD, poisoning.gaussian(std=3.0).forge(scene(size=10_000)))
    assert not np.array_equal(noise_FD, poisoning.gaussian(std=3.0).forge(scene(size=10_000, round=2)))


def test_a_little_is_enough_stays_where_a_majority_would_hide_it():
    hidden = scene(honest=26, malicious=24)
    z = (hidden.mean - poisoning.alie().forge(hidden)) / hidden.std
    assert np.allclose(z, 1.4260768722, atol=1e-6)  # the normal quantile at (26 - 2) / 26, for n = 50 and f = 24
    assert np.allclose(poisoning.alie(z=0.3).forge(hidden), hidden.mean - 0.3 * hidden.std)


def test_mimic_copies_the_honest_client_that_stands_out():
    rng = np.random.default_rng(0)
    honest_HD = rng.normal(0, 0.1, (8, 5))
    honest_HD[5, 2] += 4
    copied_D = poisoning.mimic().forge(AttackView(honest_HD=honest_HD, malicious_FD=np.zeros((2, 5)), round=1, seed=1))
    assert np.array_equal(copied_D, honest_HD[5])


def test_attacks_equal_an_independent_implementation(byzfl):
    seen = scene(3)
    theirs = byzfl.attacks.ALittleIsEnough(1.5)(seen.honest_HD)
    assert np.allclose(poisoning.alie(z=-1.5).forge(seen), theirs, atol=1e-9)
    theirs = byzfl.attacks.InnerProductManipulation(2.0)(seen.honest_HD)
    assert np.allclose(poisoning.inner_product(epsilon=2.0).forge(seen), theirs, atol=1e-9)


def test_attackers_are_the_same_all_along_and_never_the_trusted():
    attack = poisoning.sign_flip(fraction=0.25, trusted=[0, 3])
    drawn = [draw_malicious_clients(attack, range(20), seed=seed) for seed in (*range(40), 0)]
    assert {len(who) for who in drawn} == {5}
    assert drawn[0] == drawn[-1]
    assert len(set(drawn)) > 20
    assert not any(who & {0, 3} for who in drawn)
    assert draw_malicious_clients(poisoning.none(), range(20), seed=1) == frozenset()
    with pytest.raises(SettingError, match="at most 1 of 3"):
        draw_malicious_clients(poisoning.sign_flip(fraction=0.6, trusted=[0, 1]), range(3), seed=1)


def images(seed=0):
    rng = np.random.default_rng(seed)
    return Examples(rng.random((40, 4, 4, 1)).astype(np.float32), rng.integers(0, 5, 40))


def test_a_backdoor_marks_its_share_of_the_images_and_leaves_the_original_alone():
    given, attack = images(), poisoning.backdoor(target=3, share=0.25, size=2)
    before = given.x.copy()
    bad = attack.poison(given, 5)
    marked = (bad.x[:, -2:, -2:] == 1).all(axis=(1, 2, 3))
    assert marked.sum() == 10
    assert set(bad.y[marked]) == {3}
    assert np.array_equal(bad.y[~marked], given.y[~marked])
    assert np.array_equal(given.x, before)
    shown = attack.backdoor_examples(given)
    assert len(shown) == (given.y != 3).sum()
    assert (shown.x[:, -2:, -2:] == 1).all()
    with pytest.raises(SettingError, match="target is 9"):
        poisoning.backdoor(target=9).poison(given, 5)


def test_labels_are_turned_round_at_the_attackers_only_and_not_at_all_in_a_regression():
    data = linear_problem()
    attack = poisoning.label_flip()
    with pytest.raises(SettingError, match="sign_flip"):
        poison_data(data, attack, frozenset({1}))
    assert attack.poison(images(), 5).y.tolist() == (4 - images().y).tolist()


def run(strategy, attack, *, rounds=8, block_size=None):
    trainer, data = LinearTrainer(3), linear_problem(num_clients=9)
    who = draw_malicious_clients(attack, data.clients, seed=1)
    engine = ByzantineEngine(serial(data, trainer), attack, who)
    state = start(strategy, trainer.init(1), engine, seed=1)
    local = LocalSettings(epochs=2, batch_size=4, learning_rate=0.05)
    for done in federate(strategy, engine, state, schedule=Schedule(rounds=rounds), local=local):
        state = done.state
    return state.params_D


def test_an_attack_that_breaks_the_mean_is_withstood_by_a_robust_rule():
    reverse = poisoning.inner_product(fraction=0.25, epsilon=8.0)
    honest_D, broken_D = run(fedavg(), poisoning.none()), run(fedavg(), reverse)
    robust_D = run(krum(num_malicious=2, num_to_keep=4), reverse)
    assert np.linalg.norm(broken_D - honest_D) > 2
    assert np.linalg.norm(robust_D - honest_D) < 0.5


def test_a_round_with_attackers_only_or_none_is_left_as_it_is():
    everyone = ByzantineEngine(serial(linear_problem(), LinearTrainer(3)), poisoning.sign_flip(), frozenset(range(6)))
    nobody = ByzantineEngine(everyone.engine, poisoning.sign_flip(), frozenset())
    assert everyone.clients == everyone.engine.clients
    finals = []
    for engine in (everyone, nobody, everyone.engine):
        state = start(fedavg(), LinearTrainer(3).init(1), engine, seed=1)
        finals += [done.state.params_D for done in federate(fedavg(), engine, state, schedule=Schedule(rounds=1))]
    assert np.array_equal(finals[0], finals[2])
    assert np.array_equal(finals[1], finals[2])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: poisoning.sign_flip(fraction=1.0), "fraction is 1.0"),
        (lambda: poisoning.sign_flip(trusted=["a"]), "trusted"),
        (lambda: poisoning.gaussian(std=0.0), "std is 0.0"),
        (lambda: poisoning.min_max(direction="up"), "direction is up"),
        (lambda: poisoning.alie(z="much"), "z is much"),
        (lambda: poisoning.backdoor(boost=-1.0), "boost is -1.0"),
        (lambda: poisoning.backdoor(share=0.0), "share is 0.0"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(build, message):
    with pytest.raises(SettingError, match=message):
        build()
