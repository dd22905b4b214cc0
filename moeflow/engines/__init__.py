"""What engines run of what moeflow writes: one table, and the checks of a model's form against its lines. Standard library only."""

from moeflow.engines.form import Form, Packing, form_of
from moeflow.engines.table import ENGINES, Engine, engine_of, engine_word

__all__ = ["ENGINES", "Engine", "Form", "Packing", "engine_of", "engine_word", "form_of"]
