"""What connects the DAGs: an asset is updated by one and starts another."""

from __future__ import annotations

from airflow.sdk import Asset

# A new version of a task's file was read, checked and put under DVC.
DATASETS = Asset(name="datasets", uri="metapeft://datasets", group="metapeft")
# Trials were added to the experience.
EXPERIENCE = Asset(name="experience", uri="metapeft://experience", group="metapeft")
# Another meta-model became champion.
META_MODEL = Asset(name="meta-model", uri="metapeft://meta-model", group="metapeft")
# Somebody put or changed task files in the project's data folder: updated from outside (the UI, or the REST API).
INCOMING = Asset(name="incoming", uri="metapeft://incoming", group="metapeft")
# The monitor raised an alert that another meta-model may mend.
DEGRADED = Asset(name="degraded", uri="metapeft://degraded", group="metapeft")
