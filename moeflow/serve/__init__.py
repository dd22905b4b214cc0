"""What vLLM needs to run a checkpoint whose layers are no longer standard: a plug-in, found by its entry point in pyproject.toml.

Only files that vLLM itself asks for by name import it, so that `import moeflow` and its other parts need no vLLM.
"""
