"""Images: small sets in memory, large ones through worker processes."""

from vision.data.base import TensorData, VisionData
from vision.data.folders import ImageFolderData, ImageNet
from vision.data.memory import CIFAR10, CIFAR100, SVHN, Digits

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
