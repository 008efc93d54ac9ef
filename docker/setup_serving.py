"""Let Prometheus in: METRICS_KEY of .env becomes the service's key "prometheus"; harmless to repeat."""

import os

from metapeft.serving import keys

keys.adopt("prometheus", os.environ["METRICS_KEY"])
