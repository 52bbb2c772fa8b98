"""``fixup_``: other people's networks, their residual branches found and the rules applied."""
