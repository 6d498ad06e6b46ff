"""Text to token ids: tokenizers, sources, shards on disk, batches. Knows nothing of JAX."""
