"""Rewards that are composed of other rewards."""
