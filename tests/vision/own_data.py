"""A data module as a user writes it: nothing of this project's in it."""

from __future__ import annotations

import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset


class PlainData(L.LightningDataModule):
    def _loader(self, size: int) -> DataLoader:
        images = torch.randn(size, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(images, torch.arange(size) % 10), batch_size=10)

    def train_dataloader(self) -> DataLoader:
        return self._loader(40)

    def val_dataloader(self) -> DataLoader:
        return self._loader(20)

    def test_dataloader(self) -> DataLoader:
        return self._loader(20)

    def predict_dataloader(self) -> DataLoader:
        return self._loader(20)
