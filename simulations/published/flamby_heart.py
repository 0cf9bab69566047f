"""FLamby, Fed-Heart-Disease: seven strategies, pooled training and local training."""

from __future__ import annotations

from simulations.published.measures import final_accuracy
from simulations.published.records import Published, Row, Table

SOURCE = "owkin/FLamby, flamby/results/results_benchmark_fed_heart_disease, seeds 42 to 46, `Pooled Test`"
SEEDS = (42, 43, 44, 45, 46)
# mean and sample standard deviation of the five files
PUBLISHED = {
    "FedAvg100": (74.80, 2.68),
    "FedProx100": (74.80, 2.68),
    "Scaffold100": (74.80, 2.68),
    "FedAdam100": (77.87, 1.46),
    "FedYogi100": (77.87, 1.53),
    "FedAdagrad100": (77.87, 1.53),
    "Cyclic100": (78.50, 1.23),
    "Pooled Training": (79.53, 0.28),
    "Local 0": (78.43, 0.70),
    "Local 1": (72.68, 1.29),
    "Local 2": (48.27, 4.49),
    "Local 3": (61.10, 3.93),
}
CYCLIC_ALONE = (
    "In FLamby's code, the client models of `Cyclic` are copies, and no round passes parameters on "
    "(flamby/strategies/cyclic.py). The result is the model of Cleveland (`run()[0]` in "
    "flamby/benchmarks/fed_benchmark.py). The orders for these seeds visit Cleveland in 4, 4, 4, 4 and 3 of the 15 "
    "rounds. So this row trains at Cleveland only, in 4 rounds of 100 SGD steps."
)
CYCLIC = "The model visits the hospitals one after another. FLamby has no published value of this experiment."
SCAFFOLD = (
    "FLamby weights updates and control variates by the number of patients (flamby/strategies/scaffold.py). So does "
    "this row (`strategy.weighting=examples`). With the equal weights of the paper of SCAFFOLD, it is 70.94 ± 5.56."
)


def _row(name: str, method: str, settings: str, note: str = "") -> Row:
    published = None
    if method in PUBLISHED:
        value, deviation = PUBLISHED[method]
        published = Published(value=value, deviation=deviation, source=SOURCE)
    words = (*settings.split(), "report=false", "checkpoint_every=50", "evaluate_every=50")
    return Row(
        name=name,
        label=method,
        settings=words,
        seeds=SEEDS,
        measures=(final_accuracy(published),),
        note=note,
        has_published=published is not None,
    )


TABLE = Table(
    name="flamby_heart",
    title="FLamby, Fed-Heart-Disease",
    paper="Ogier du Terrail et al., *FLamby*, NeurIPS 2022 Datasets and Benchmarks, arXiv:2210.04620",
    protocol=(
        "740 patients of four hospitals, logistic regression, batches of 4, 15 rounds of 100 SGD steps, "
        "learning rates of flamby/config_heart_disease.json. Pooled and local training: Adam at 0.001 for 50 "
        "epochs. The measure is the accuracy on the 254 pooled test patients after the last round. `Local 0` to "
        "`Local 3` are Cleveland, Hungary, Switzerland and Long Beach. One patient is 0.39 points."
    ),
    rows=(
        _row("fedavg", "FedAvg100", "experiment=flamby_heart_fedavg"),
        _row("fedprox", "FedProx100", "experiment=flamby_heart_fedprox"),
        _row("scaffold", "Scaffold100", "experiment=flamby_heart_scaffold", SCAFFOLD),
        _row("fedadam", "FedAdam100", "experiment=flamby_heart_fedadam"),
        _row("fedyogi", "FedYogi100", "experiment=flamby_heart_fedyogi"),
        _row("fedadagrad", "FedAdagrad100", "experiment=flamby_heart_fedadagrad"),
        _row(
            "cyclic_alone",
            "Cyclic100",
            "experiment=flamby_heart_pooled scenario.training_set=0 rounds=4 local.steps=100 local.optimizer=sgd "
            "local.learning_rate=0.01",
            CYCLIC_ALONE,
        ),
        _row("cyclic", "cyclic weight transfer", "experiment=flamby_heart_cyclic", CYCLIC),
        _row("pooled", "Pooled Training", "experiment=flamby_heart_pooled"),
        *(
            _row(f"local_{client}", f"Local {client}", f"experiment=flamby_heart_pooled scenario.training_set={client}")
            for client in range(4)
        ),
    ),
)
