"""Plots: one style, the charts of every program, and drawing those of a run folder again."""
