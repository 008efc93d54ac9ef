"""Base models: the packaged one, any mlx-lm hub id, any local folder.

`load(id)` gives a frozen model ready to compute with; `fetch(id)` only makes the folder available; `check(id)` only
refuses what cannot be a backbone; `identity(id)` is what results on it belong to.
"""

from metapeft.backbones.loading import Backbone, check, fetch, identity, load
from metapeft.backbones.packaged import PACKAGED

__all__ = ["PACKAGED", "Backbone", "check", "fetch", "identity", "load"]
