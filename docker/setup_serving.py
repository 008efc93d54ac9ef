"""Let Prometheus and the workers in: two secrets of .env become keys of the service; harmless to repeat."""

import os

from metapeft.serving import keys

keys.adopt("prometheus", os.environ["METRICS_KEY"])
keys.adopt("workers", os.environ["SERVER_KEY"], admin=True)  # they say when a model was promoted
