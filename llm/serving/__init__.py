"""A trained model behind HTTP: continuous batching and the completions protocol."""
