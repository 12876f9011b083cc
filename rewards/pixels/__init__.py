"""Rewards of the pixels themselves, without weights."""
