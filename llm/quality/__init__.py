"""Which documents are worth training on: rules of quality, personal data, duplicates."""
