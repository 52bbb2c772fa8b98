"""The paper's figures as commands: ``python -m vision sweep``; ``sweeps`` has their list."""
