"""A kill at a known place, for ``--trainer.callbacks``."""

import os

from lightning.pytorch.callbacks import Callback


class Kill(Callback):
    """Ends the process behind the seventh step of an epoch, without a farewell."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if batch_idx == 6:
            os._exit(9)
