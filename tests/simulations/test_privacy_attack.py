from __future__ import annotations

import json
from pathlib import Path

import pytest
from needs import needs

from simulations.privacy_attack import main

needs("torch")


@pytest.fixture
def attacked(tmp_path, monkeypatch):
    """Return ``attacked(*words) -> (exit code, content of privacy_attack.json, folder)``."""
    monkeypatch.chdir(tmp_path)

    def command(*words: str, folder: str = "found"):
        code = main([*words, f"hydra.run.dir={folder}"])
        path = tmp_path / folder / "privacy_attack.json"
        return code, json.loads(path.read_text()) if path.exists() else {}, tmp_path / folder

    return command


def test_clipping_alone_protects_nothing_and_noise_or_masks_do(attacked):
    pytest.importorskip("cryptography")
    code, found, folder = attacked(
        "kind=gradient_inversion", "privacy_attack.victims=100", "privacy_attack.noise=[0.1,1]"
    )
    assert code == 0
    by = {result["defense"]: result for result in found["results"]}
    for bare in ("nothing", "clipped to 1"):
        assert by[bare]["label_accuracy"] == 1.0
        assert by[bare]["image_correlation"] > 0.99
    assert 0.6 < by["clipped, noise 0.1"]["label_accuracy"] < 1.0
    for covered in ("clipped, noise 1", "masked"):
        assert by[covered]["label_accuracy"] < 0.3
        assert abs(by[covered]["image_correlation"]) < 0.05
    assert by["clipped, noise 1"]["epsilon"] == pytest.approx(9.997, rel=1e-3)  # sensitivity 2 C: multiplier 1/2
    assert by["nothing"]["epsilon"] is None
    assert by["masked"]["epsilon"] is None
    assert "clipping alone protects nothing" in found["verdict"]
    assert (folder / "images.png").stat().st_size > 10_000
    assert "data:image/png" in (folder / "report.html").read_text()


def test_central_noise_does_not_protect_an_upload_from_the_server(attacked):
    words = ["privacy=central", "privacy.noise_multiplier=1", "privacy_attack.victims=20", "privacy_attack.noise=[1]"]
    found = attacked("kind=gradient_inversion", *words)[1]
    central = found["results"][-1]
    assert central["defense"] == "privacy=central"
    assert (central["label_accuracy"], central["epsilon"]) == (1.0, None)
    assert central["image_correlation"] > 0.99


def test_dp_sgd_hides_an_example_from_inversion(attacked):
    words = [
        "privacy=example",
        "privacy.noise_multiplier=1",
        "privacy_attack.victims=40",
        "privacy_attack.noise=[1]",
        "model=linear",
    ]
    found = attacked("kind=gradient_inversion", *words)[1]
    private = found["results"][-1]
    assert private["label_accuracy"] < 0.5
    assert private["image_correlation"] < 0.1
    assert private["epsilon"] == pytest.approx(4.377, rel=1e-3)


@pytest.mark.parametrize(
    ("words", "labels"),
    [
        (["scenario=diabetes"], None),  # regression on a table
        (["model._target_=audited_nets.mlp", "allow_targets=[audited_nets]"], 1.0),
    ],
    ids=["table", "model of the user"],
)
def test_the_attack_reads_tables_and_models_of_users(words, labels, attacked, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "models_of_users"))
    settings = ["privacy_attack.victims=20", "privacy_attack.noise=[1]"]
    code, found, _ = attacked("kind=gradient_inversion", *settings, *words)
    assert code == 0
    bare, *_, noisy = [result for result in found["results"] if result["defense"] != "masked"]
    assert bare["image_correlation"] > 0.99
    assert bare["label_accuracy"] == labels
    assert abs(noisy["image_correlation"]) < 0.3


def test_members_are_found_without_protection_and_hardly_with_dp_sgd(attacked):
    private = ["privacy=example", "privacy.noise_multiplier=1", "privacy.delta=1e-3"]
    code, found, folder = attacked(
        "kind=membership_inference", *private, "privacy_attack.shadows=12", "local.epochs=20"
    )
    assert code == 0
    bare, dp = found["results"]
    assert bare["attacks"]["LiRA"]["auc"] > 0.68
    assert dp["attacks"]["LiRA"]["auc"] < 0.65
    assert dp["attacks"]["LiRA"]["tpr_at_1_percent"] <= dp["allowed_tpr_at_1_percent"]
    assert 6 < dp["epsilon"] < 9
    assert (folder / "members.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "kind is missing"),
        (["kind=invrsion"], "kind=gradient_inversion"),
        (["kind=gradient_inversion", "model=cnn", "privacy_attack.victims=20"], "affine first layer"),
        (["kind=gradient_inversion", "privacy_attack.noise=[0]"], "privacy_attack.noise is [0.0]"),
        (["kind=gradient_inversion", "privacy_attack.clip=x", "privacy_attack.victims=5"], "clip is x"),
        (["kind=gradient_inversion", "engine=ray"], "engine=vector"),
        (["kind=gradient_inversion", "privacy_attack.shadows=9"], "privacy_attack.shadows=9 is not a setting"),
        (["kind=membership_inference", "privacy_attack.members=2000"], "privacy_attack.members is 2000"),
        (["kind=membership_inference", "scenario=diabetes"], "binary or multiclass"),
        (["kind=membership_inference", "privacy=central", "privacy.noise_multiplier=1"], "strategy.weighting=equal"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value) or "no words",
)
def test_what_cannot_be_attacked_is_refused_and_leaves_no_folder(words, says, attacked, capsys):
    code, _, folder = attacked(*words)
    assert code == 2
    assert says in capsys.readouterr().err
    assert not folder.exists()


def test_a_mechanism_that_does_not_protect_uploads_has_no_membership_claim_to_test(attacked, capsys):
    central = ["privacy=central", "privacy.noise_multiplier=1", "strategy.weighting=equal"]
    assert attacked("kind=membership_inference", *central)[0] == 2
    assert "none, example or local" in capsys.readouterr().err


def test_help_names_the_settings(capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--help"])
    assert "kind=membership_inference" in capsys.readouterr().out
