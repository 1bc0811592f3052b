"""moe_jax: a small, complete laboratory for DeepSeek-style language models in JAX."""
