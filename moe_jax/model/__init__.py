"""The transformer: attention, router, experts, multi-token prediction."""
