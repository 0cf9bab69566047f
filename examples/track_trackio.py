"""Log a run to trackio, whose database stays on this machine. The command ``trackio show`` draws the curves."""

import trackio

import fedlearn
from fedlearn.callbacks import Callback
from fedlearn.callbacks.tracking import round_numbers, settings_as_typed, sweep_folder


class Trackio(Callback):
    """Log settings and numbers. A resumed run continues its run, and a sweep is a group."""

    tracked = None

    def on_start(self, run):
        """Start the run of trackio, or continue it. The name of the run is the name of its folder."""
        sweep, settings = sweep_folder(run), settings_as_typed(run.config)
        named = {"name": str(run.folder), "group": sweep and sweep.name}
        self.tracked = trackio.init(project="fedlearn", resume="allow", config=settings, embed=False, **named)

    def on_round(self, round):
        """Log the numbers of ``metrics.jsonl``."""
        self.tracked.log(round_numbers(round), step=round.number)

    def close(self):
        """End the run of trackio."""
        if self.tracked is not None:
            self.tracked.finish()
            self.tracked = None


result = fedlearn.run("digits", "fedprox", rounds=3, callbacks=[Trackio()], show=False)
result = fedlearn.run(resume=result.folder, rounds=5, callbacks=[Trackio()], show=False)
print(f"logged {len(result.metrics)} rounds as {result.folder.name}")
