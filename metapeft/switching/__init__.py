"""Switching methods while training: forecasts, decisions, and keeping what was learned. See docs/switching.md."""
