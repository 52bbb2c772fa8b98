"""Fixup Transformers for fairseq: ``fairseq-train DATA --user-dir fixup_mt --arch ...``.

Importing the package registers the models ``transformer_fixup``, ``transformer_fixup_lm`` and
``transformer_fixup_encoder``, and repairs what today's fairseq does silently wrong
(``fixup_mt.host.repairs``).
"""

import functools
import sys
from itertools import pairwise


@functools.cache
def register() -> None:
    """Register the models and apply the repairs; more than once is harmless."""
    from fixup_mt.host import repairs
    from fixup_mt.model import presets  # which imports, and so registers, the models

    presets.register()
    repairs.apply()


def _starts_command() -> bool:
    """Whether ``python -m fixup_mt`` is starting: argv[0] is "-m" while Python looks for it."""
    return sys.argv[:1] == ["-m"] and ("-m", __name__) in pairwise(sys.orig_argv)


# A help text must not wait for fairseq; the commands register where they need to.
if not _starts_command():
    register()
