"""The training of a network: Lightning module, mixing, callbacks, checkpoints."""
