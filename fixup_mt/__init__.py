"""Fixup Transformers for fairseq: ``fairseq-train DATA --user-dir fixup_mt --arch ...``.

Importing the package registers the models ``transformer_fixup`` and ``transformer_fixup_lm`` and
repairs what today's fairseq does silently wrong (``fixup_mt.host.repairs``).
"""

from fixup_mt.host import repairs as _repairs
from fixup_mt.model import model as _model  # noqa: F401 (registers the models)
from fixup_mt.model import presets as _presets

_presets.register()
_repairs.apply()
