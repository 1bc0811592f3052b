"""Reinforcement learning: environments, rewards, rollouts and updates."""
