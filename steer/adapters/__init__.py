"""Low-rank adapters: on a flow, in a folder, and their model card."""
