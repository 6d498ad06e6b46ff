"""One run on disk: its directory, checkpoints, metrics, and what a person sees of it."""
