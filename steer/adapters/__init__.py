"""Low-rank adapters: on a flow, in a folder, and the card that describes them."""
