from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest

from fedlearn.core.privacy_guarantee import PrivacyGuarantee
from fedlearn.core.privacy_ledger import Event
from fedlearn.privacy.accounting import max_epsilon_bounds
from fedlearn.privacy.gaussian_noise import add_gaussian_noise
from fedlearn.privacy.mechanisms.base import Mechanism, replace_parts
from fedlearn.privacy.secagg import masked_sum
from fedlearn.trainers.torch import TorchTrainer
from fedlearn.trainers.torch.noise import GridNoise
from simulations.audit import main

DIGITS = ["scenario=digits", "report=false"]
EQUAL = [*DIGITS, "strategy.weighting=equal"]
SINGLE = "privacy.noise_multiplier=1"
MECHANISMS = {
    "central": [*EQUAL, "privacy=central", SINGLE],
    "adaptive": [*EQUAL, "privacy=central", "privacy.clip=adaptive", SINGLE],
    "ftrl": [*EQUAL, "privacy=ftrl", "privacy.matrix=tree", SINGLE, "rounds=3", "audit.rounds=3"],
    "local": [*EQUAL, "privacy=local", "privacy.noise_multiplier=2"],
    "example": [*DIGITS, "privacy=example", SINGLE],
    "frozen": [*EQUAL, "strategy=ffa_lora", "strategy.frozen_parameters='*bias'", "privacy=central", SINGLE],
}


@pytest.fixture
def audited(tmp_path, monkeypatch):
    """Return ``audited(*words) -> (exit code, content of audit.json)``."""
    monkeypatch.chdir(tmp_path)

    def command(*words: str, folder: str = "found") -> tuple[int, dict]:
        code = main([*words, f"hydra.run.dir={folder}"])
        path = tmp_path / folder / "audit.json"
        return code, json.loads(path.read_text()) if path.exists() else {}

    return command


@pytest.fixture
def weakened(monkeypatch):
    """Divide the noise of all mechanisms by five."""

    def fifth(update, draws, std):
        return add_gaussian_noise(update, draws, std / 5)

    for name in ("central_dp", "local_dp", "dp_ftrl"):
        monkeypatch.setattr(import_module(f"fedlearn.privacy.mechanisms.{name}"), "add_gaussian_noise", fifth)
    shrink_noise(monkeypatch, 0.2)


def shrink_noise(monkeypatch, factor):
    """Multiply the noise of DP-SGD in torch by a factor."""
    right = GridNoise.draw_
    monkeypatch.setattr(GridNoise, "draw_", lambda self, values: right(self, values).mul_(factor))


@pytest.mark.parametrize("words", MECHANISMS.values(), ids=MECHANISMS)
def test_the_bound_is_below_the_claim_of_every_mechanism(words, audited, tmp_path):
    code, found = audited(*words)
    assert code == 0
    assert 0.8 < found["epsilon_lower_bound"] < found["claimed_epsilon"] == pytest.approx(4.377178, rel=1e-3)
    assert (tmp_path / "found" / "scores.png").stat().st_size > 10_000
    assert "The claim holds" in (tmp_path / "found" / "report.html").read_text()


@pytest.mark.usefixtures("weakened")
@pytest.mark.parametrize("words", MECHANISMS.values(), ids=MECHANISMS)
def test_a_build_whose_noise_is_five_times_too_small_is_caught(words, audited, capsys):
    code, found = audited(*words)
    assert code == 3
    assert found["alarm"]
    assert found["epsilon_lower_bound"] > found["claimed_epsilon"]
    assert "ALARM" in capsys.readouterr().out


def test_a_build_that_does_not_clip_is_caught(audited, monkeypatch):
    central = import_module("fedlearn.privacy.mechanisms.central_dp")
    monkeypatch.setattr(central, "clip_finite", lambda update, bound: update)
    assert audited(*MECHANISMS["central"])[0] == 3


def test_without_protection_the_bound_is_above_six(audited):
    code, found = audited(*DIGITS)
    assert (code, found["claimed_epsilon"]) == (0, None)
    assert found["epsilon_lower_bound"] > 6


@pytest.mark.parametrize(
    "words",
    [
        [*EQUAL, "privacy=central", SINGLE, "strategy.clients_per_round=250"],
        [*EQUAL, "privacy=central", SINGLE, "strategy.clients_per_round=500", "privacy.sampling=fixed_size"],
    ],
    ids=["poisson", "fixed_size"],
)
def test_where_the_claim_counts_on_sampling_no_law_is_assumed_and_the_bound_is_below_it(words, audited):
    code, found = audited(*words)
    assert code == 0
    assert 0 < found["epsilon_lower_bound"] < found["claimed_epsilon"]
    assert found["assumption"].startswith("any")


def test_the_jax_twin_of_dp_sgd_is_audited_as_well(audited):
    pytest.importorskip("jax")
    code, found = audited(*MECHANISMS["example"], "framework=jax")
    assert code == 0
    assert 0.8 < found["epsilon_lower_bound"] < found["claimed_epsilon"]


def private(model: str) -> list[str]:
    return [
        *DIGITS,
        "privacy=example",
        SINGLE,
        f"model._target_=audited_nets.{model}",
        "allow_targets=[audited_nets]",
        "audit.canaries=200",
    ]


@pytest.fixture
def nets(monkeypatch):
    """Return the folder of the models that a user brings."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "models_of_users"))


@pytest.mark.usefixtures("nets")
def test_the_audit_runs_the_model_of_the_user(audited):
    code, found = audited(*private("mlp"))
    assert code == 0
    assert found["movement"] == pytest.approx(1, abs=0.01)
    assert found["noise_multiplier"] == pytest.approx(1, abs=0.02)
    assert found["canary_signal"] == pytest.approx(1, abs=0.01)  # the canary is clipped, so it is the worst case


@pytest.mark.usefixtures("nets")
def test_a_model_that_mixes_examples_is_refused(audited, capsys):
    assert audited(*private("centered"))[0] == 2
    assert "privacy" in capsys.readouterr().err


@pytest.mark.usefixtures("nets")
@pytest.mark.parametrize("model", ["tokens_as_rows", "time_first"])
def test_a_model_with_the_batch_on_another_axis_moves_the_sum_by_one_clip_norm(model, audited):
    code, found = audited(*private(model))
    assert code == 0
    assert found["movement"] <= 1.001


@pytest.mark.usefixtures("nets")
def test_a_movement_above_the_clip_norm_is_an_alarm(audited, monkeypatch, capsys):
    # a trainer that clips to three times the norm, behind all refusals of models
    right = TorchTrainer.fit

    def fit(self, request, rule, work):
        dp = request.local.example_dp
        local = replace(
            request.local, example_dp=dp and replace(dp, clip=3 * dp.clip, noise_multiplier=dp.noise_multiplier / 3)
        )
        return right(self, replace(request, local=local), rule, work)

    monkeypatch.setattr(TorchTrainer, "fit", fit)
    code, found = audited(*private("mlp"))
    assert code == 3
    assert found["movement"] == pytest.approx(3, rel=0.01)
    assert found["epsilon_lower_bound"] > found["claimed_epsilon"]
    assert "one example moves the clipped sum by 3 clip norms" in capsys.readouterr().out


def test_noise_that_is_a_tenth_too_small_is_caught_although_the_bound_is_below_the_claim(audited, monkeypatch):
    shrink_noise(monkeypatch, 0.9)
    code, found = audited(*MECHANISMS["example"], "audit.canaries=100")
    assert code == 3
    assert found["epsilon_lower_bound"] < found["claimed_epsilon"]
    assert found["noise_multiplier"] == pytest.approx(0.9, abs=0.01)


def masked(**settings) -> Mechanism:
    """Build a mechanism with noise of the clients, charged with its equivalent noise multiplier."""
    built = masked_sum.Masking(
        **{"clip_norm": 1.0, "noise": "skellam", "noise_multiplier": 1.0, "bits": 14, **settings}
    )

    def protect(strategy, local, population):
        release = built.noisy_sum(built.cohort_size(strategy, population.num_clients))
        protection = PrivacyGuarantee(
            charge=lambda ledger, release_: ledger.charge_federation(Event(release.equivalent_noise_multiplier)),
            epsilon_of=lambda ledger: max_epsilon_bounds([ledger.federation], delta=1e-5),
            kind="distributed",
            unit="client",
            adjacency="one client more or less",
            delta=1e-5,
        )
        protected = built.protect(strategy, num_clients=population.num_clients)
        return replace_parts(protected, privacy_guarantee=protection), local

    return Mechanism(validate=lambda strategy, local: None, protect=protect, kind="distributed")


@pytest.mark.parametrize("noise", ["skellam", "discrete_gaussian"])
def test_the_bound_on_a_sum_with_distributed_noise_is_below_its_claim_and_weaker_noise_is_caught(
    noise, audited, monkeypatch
):
    pytest.importorskip("cryptography")
    monkeypatch.setattr("fedlearn.privacy.mechanisms.none", partial(masked, noise=noise))
    words = [*EQUAL, "audit.canaries=1000"]
    code, found = audited(*words)
    assert code == 0
    assert 0.3 < found["epsilon_lower_bound"] < found["claimed_epsilon"] == pytest.approx(4.38, abs=0.05)
    right = masked_sum.draw_noise
    monkeypatch.setattr(masked_sum, "draw_noise", lambda kind, std, *args: right(kind, std / 8, *args))
    # half of the cohort may drop out, so the sum has twice the claimed variance
    assert audited(*words, folder="weak")[0] == 3


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["audit.canaries=5"], "audit.canaries is 5"),
        (["audit.canaries=100000"], "at most 4810"),
        (["audit.rounds=21"], "audit.rounds is 21"),
        (["privacy=example", SINGLE, "local.batch_size=10", "audit.examples=11"], "audit.examples is 11"),
        (["privacy=example", SINGLE, "local.batch_size=1"], "local.batch_size is 1"),
        (["audit.canary=100"], "audit.canaries=100"),
        (["privacy=centrl"], "did you mean privacy=central?"),
        (["privacy=central", SINGLE], "strategy.weighting=equal"),
        (["engine=ray"], "engine=vector"),
        (["-m", "seed=1,2"], "one after another"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_what_cannot_be_audited_is_refused_and_leaves_no_folder(words, says, audited, tmp_path, capsys):
    assert audited(*DIGITS, *words)[0] == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "found").exists()


def test_without_jax_privacy_the_message_names_the_extra(audited, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jax_privacy", None)
    assert audited(*DIGITS)[0] == 2
    assert "pip install 'fedlearn[audit]'" in capsys.readouterr().err


def test_help_names_the_settings(capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--help"])
    assert "audit.canaries" in capsys.readouterr().out


@pytest.mark.slow
def test_canary_sentences_are_measured_by_the_command(audited, tmp_path, capsys):
    pytest.importorskip("peft")
    tiny_models = pytest.importorskip("tiny_models")
    model, texts = tiny_models.decoder(tmp_path / "gpt2"), tmp_path / "texts"
    texts.mkdir()
    for site in ("north", "south"):
        rows = [f"w{row} good film the a of boring great bad film the good a" for row in range(16)]
        (texts / f"{site}.csv").write_text("\n".join(["text", *rows, ""]))
    words = ["scenario=text", "scenario.task=causal_lm", "scenario.text=text", f"scenario.path={texts}"]
    words += [f"model.path={model}", "scenario.length=32", "rounds=1", "local.steps=1", "audit.canaries=100"]
    assert audited(*words, "audit.sentences=2")[0] == 0
    assert "mean exposure" in capsys.readouterr().out
    sentences = json.loads((tmp_path / "found/audit.json").read_text())["sentences"]
    assert len(sentences["exposure"]) == 2
    assert sentences["rounds"] == 1
