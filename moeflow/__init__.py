"""Compress Mixture-of-Experts language models as a graph of cached steps."""

from moeflow.model import autoload

__version__ = "0.2.0"

autoload.register()  # transformers loads compressed checkpoints from now on; imports nothing of it yet
