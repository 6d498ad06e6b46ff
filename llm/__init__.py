"""Pretrain GPT-style language models with JAX and Flax, and see the probability of every token."""
