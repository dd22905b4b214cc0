"""Compress Mixture-of-Experts language models as a graph of cached steps."""

__version__ = "0.1.0"
