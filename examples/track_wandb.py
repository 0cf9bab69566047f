"""Log a run to Weights & Biases. WANDB_MODE=offline, the default here, keeps all files on this machine."""

import os
import secrets

import wandb

import fedlearn
from fedlearn.callbacks import Callback
from fedlearn.callbacks.tracking import name_of_run, round_numbers, settings_as_typed, sweep_folder


class WeightsAndBiases(Callback):
    """Log settings, numbers and report. A resumed run continues its run, and a sweep is a group."""

    reads_run_files = True  # on_end comes after the report is written
    tracked = None

    def on_start(self, run):
        """Start the run of W&B, or continue it."""
        self.report, id_file, sweep = run.folder / "report.html", run.file("wandb.txt"), sweep_folder(run)
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(8))
        named = {"id": id_file.read_text(), "name": name_of_run(run), "group": sweep and sweep.name}
        settings = settings_as_typed(run.config)
        self.tracked = wandb.init(project="fedlearn", resume="allow", dir=run.folder, config=settings, **named)

    def on_round(self, round):
        """Log the numbers of ``metrics.jsonl``."""
        self.tracked.log(round_numbers(round), step=round.number)

    def on_end(self, summary):
        """Log the final metrics and the report."""
        self.tracked.summary.update({f"final/{name}": value for name, value in summary["final"].items()})
        if self.report.exists():
            self.tracked.save(self.report, base_path=self.report.parent, policy="now")

    def close(self):
        """End the run of W&B."""
        if self.tracked is not None:
            self.tracked.finish()
            self.tracked = None


os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
result = fedlearn.run("digits", "fedprox", rounds=3, callbacks=[WeightsAndBiases()], show=False)
result = fedlearn.run(resume=result.folder, rounds=5, callbacks=[WeightsAndBiases()], show=False)
print(f"wandb sync {result.folder / 'wandb'}/offline-run-*")
