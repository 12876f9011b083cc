"""Steer and reward-tune flow maps."""
