"""A trained model in Python: what `llm.load` returns."""
