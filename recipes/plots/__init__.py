"""Plots: one style, the charts of all programs, and redrawing those of a run folder."""
