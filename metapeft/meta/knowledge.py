"""Everything known at this moment: trials, profiles of their tasks, and observations made of both. Read once, kept
while the files stay as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from metapeft.meta.evidence import Observation, gather
from metapeft.meta.experience import Experience
from metapeft.meta.teacher import taught
from metapeft.meta.unfinished import Remaining
from metapeft.profiling import Profile, every_profile
from metapeft.training.trial import Trial

_kept: dict[Path, tuple[object, Knowledge]] = {}  # by the experience's folder: what the files looked like


@dataclass(frozen=True)
class Knowledge:
    """`profiles`: by (task version, backbone)."""

    trials: tuple[Trial, ...]
    profiles: Mapping[tuple[str, str], Profile]
    _observed: dict[object, list[Observation]] = field(default_factory=dict, compare=False)

    @cached_property
    def untuned(self) -> dict[tuple[str, str], float]:
        """Score of the untuned backbone by (task version, backbone), from trials, else from profiles."""
        profiled = {place: p.features["zero_shot_score"] for place, p in self.profiles.items()}
        tested = [t for t in self.trials if t.untuned_score]
        return profiled | {(t.task_version, t.backbone): t.untuned_score.value for t in tested if t.untuned_score}

    def observations(self, remaining: Remaining | None = None) -> list[Observation]:
        """Of all trials."""
        place = remaining or Remaining()
        if place not in self._observed:
            features = {known: profile.features for known, profile in self.profiles.items()}
            self._observed[place] = taught(gather(self.trials, features, self.untuned, place))
        return self._observed[place]


def knowledge(experience: Experience | None = None) -> Knowledge:
    """experience: None is the one in METAPEFT_HOME."""
    store = experience or Experience()
    profiles = every_profile()
    measured = tuple(sorted((place, profile.embedding) for place, profile in profiles.items()))
    state = (store.state(), store.shipped, measured)
    folder = store.folder.absolute()
    if folder not in _kept or _kept[folder][0] != state:
        _kept[folder] = (state, Knowledge(tuple(store.trials()), profiles))
    return _kept[folder][1]
