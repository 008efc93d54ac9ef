"""MLflow: runs, the registry of adapters, and comparisons. `with tracking.run(settings, name) as tracker: …`"""

from metapeft.tracking.tracker import RUN_ID, Tracker, run

__all__ = ["RUN_ID", "Tracker", "run"]
