"""Images: small sets in memory, large ones through worker processes."""

from vision.data.modules import (
    CIFAR10,
    CIFAR100,
    SVHN,
    Digits,
    ImageFolderData,
    ImageNet,
    TensorData,
    VisionData,
)

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "SVHN",
    "Digits",
    "ImageFolderData",
    "ImageNet",
    "TensorData",
    "VisionData",
]
