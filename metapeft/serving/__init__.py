"""The HTTP service: one resident backbone, adapters from the registry, recommendations."""
