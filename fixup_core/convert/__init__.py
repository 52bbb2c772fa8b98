"""``fixup_``: other people's networks, their residual branches found and the rules applied.

The files in the order of the story: ``convert`` tells it. ``tracing`` makes a graph of the network,
in the ``operations`` that ``joins`` finds residual branches among; ``survey`` reads what else the
graph says, ``traced_plan`` or ``plan`` decides; ``apply`` and ``attach`` change the modules,
``calibration`` sets what a batch sets, ``undo`` puts everything back where one of them fails.
"""
