"""Real nodes that fine-tune a pretrained model: the same model as in a simulation, and never two different bases."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

import fedlearn
from fedlearn.deploy.processes import GRACE_S, Children
from fedlearn.deploy.rehearse import Rehearsal
from fedlearn.runner.start import main as simulate
from simulations.generate import main as generate

pytest.importorskip("torch")
pytest.importorskip("peft")
tiny_models = pytest.importorskip("tiny_models")

ROOT = Path(fedlearn.__file__).parents[1]
STRATEGIES = {
    "fedit": (),
    "ffa_lora": (),
    "fedsa_lora": (),
    "diloco": ("local.optimizer=adamw",),
    "flora": ("strategy.ranks=[2,4]", "model.mergeable=true"),
}
POLICY = {
    "scenarios": {"text": {"model": {"one_of": ["hf"]}}},
    "strategies": {name: {} for name in ("fedavg", *STRATEGIES)},
    "max_rounds": 1000,
}
CLASSIFICATION = ("scenario.length=16", "scenario.text=text", "scenario.target=target", "scenario.classes=[neg,pos]")
CAUSAL = ("scenario.length=64", "scenario.task=causal_lm", "scenario.prompt=text", "scenario.response=target")
SHARED = ("scenario=text", "scenario.clients=[north,south]", "model.rank=4", "rounds=2", "report=false")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with two clients, and with three pretrained models: two of them have equal shapes."""
    root = tmp_path_factory.mktemp("p")
    (root / "texts").mkdir()
    for site, word in (("north", "w1"), ("south", "w2")):
        rows = [f"{word} {'good' if row % 2 else 'bad'} film,{'pos' if row % 2 else 'neg'}" for row in range(16)]
        (root / "texts" / f"{site}.csv").write_text("\n".join(["text,target", *rows, ""]))
    tiny_models.bert(root / "bert")
    tiny_models.decoder(root / "gpt2")
    shutil.copytree(root / "bert", root / "other")
    weights = root / "other/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # the last bit of the last weight
    weights.write_bytes(content)
    return root


class TextRehearsal(Rehearsal):
    """Two nodes, whose policies name a folder each for the model ``base``."""

    def __init__(self, root: Path, runs: Path, data: Path, models: tuple[Path, Path]) -> None:
        super().__init__(root, runs, [[0], [1]], POLICY, str(data))
        self.policies = {}
        for number, model in enumerate(models):
            path = self.folder / f"policy{number}.yaml"
            path.write_text(json.dumps({**POLICY, "models": {"base": str(model)}}))
            path.chmod(0o600)
            self.policies[f"node{number}"] = path

    def _node(self, name, clients):
        self.policy = self.policies[name]
        return super()._node(name, clients)


def start_nodes(federation_class, tmp_path_factory, folder, models):
    class TextFederation(federation_class):
        words = SHARED

    root = tmp_path_factory.mktemp("f")
    with pytest.MonkeyPatch.context() as patch, Children(grace_s=2 * GRACE_S) as children:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        rehearsal = TextRehearsal(root, root / "runs", folder / "texts", models)
        rehearsal.start(children)
        yield TextFederation(rehearsal)


@pytest.fixture(scope="module")
def bert_federation(federation_class, tmp_path_factory, folder):
    yield from start_nodes(federation_class, tmp_path_factory, folder, (folder / "bert", folder / "bert"))


@pytest.fixture(scope="module")
def gpt2_federation(federation_class, tmp_path_factory, folder):
    yield from start_nodes(federation_class, tmp_path_factory, folder, (folder / "gpt2", folder / "gpt2"))


@pytest.fixture(scope="module")
def mixed_federation(federation_class, tmp_path_factory, folder):
    yield from start_nodes(federation_class, tmp_path_factory, folder, (folder / "bert", folder / "other"))


def sha_of_simulation(run, folder, base, *words):
    words = (*SHARED, f"scenario.path={folder / 'texts'}", f"model.path={folder / base}", *words)
    assert simulate([*words, "engine=serial", f"hydra.run.dir={run}"]) == 0
    return json.loads((run / "summary.json").read_text())["parameters_sha256"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_strategy_for_adapters_ends_with_the_bits_of_a_simulation(bert_federation, folder, tmp_path, strategy):
    words = (*CLASSIFICATION, f"strategy={strategy}", *STRATEGIES[strategy])
    deployed = bert_federation.run(*words, "model.path=base", name=strategy)
    assert deployed.code == 0, deployed.text
    assert deployed.summary["parameters_sha256"] == sha_of_simulation(tmp_path, folder, "bert", *words)


@pytest.mark.slow
def test_a_language_model_of_two_nodes_writes_text_after_the_deployment(gpt2_federation, folder, tmp_path, capsys):
    deployed = gpt2_federation.run(*CAUSAL, "model.path=base", name="causal")
    assert deployed.code == 0, deployed.text
    assert deployed.summary["parameters_sha256"] == sha_of_simulation(tmp_path, folder, "gpt2", *CAUSAL)
    question = ["--prompt", "w1 good film", "--length", "5"]
    capsys.readouterr()
    assert generate([str(tmp_path), *question]) == 0
    expected = capsys.readouterr().out
    assert generate([str(deployed.folder), *question, "--base", str(folder / "gpt2")]) == 0
    assert capsys.readouterr().out == expected
    for base in ("bert", "absent"):  # another model, and no model
        assert generate([str(deployed.folder), *question, "--base", str(folder / base)]) == 2
        assert "--base FOLDER" in capsys.readouterr().err


@pytest.mark.slow
def test_a_node_with_another_base_is_refused_by_name(mixed_federation, folder):
    words = (*CLASSIFICATION, "model.path=base", "engine.join_timeout=90")
    both = mixed_federation.run(*words, "sites=[node0,node1]", name="both")
    assert both.code != 0
    assert "refused: node1" in both.text
    assert "the SHA-256 of its pretrained model is" in both.text
    alone = mixed_federation.run(*words, name="alone")
    assert alone.code == 0, alone.text
    assert {line["num_updates"] for line in alone.lines} == {1}  # the other node takes part in no round
