"""Those who look on while a run goes: the console and the files of the run folder."""
