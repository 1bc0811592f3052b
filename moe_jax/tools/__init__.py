"""Tools that act on a run or a checkpoint; `python -m moe_jax` names them."""
