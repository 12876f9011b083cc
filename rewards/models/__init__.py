"""Rewards from published weights."""
