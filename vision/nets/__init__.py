"""Networks by name: ``build_net("cifar_resnet110", method="fixup", num_classes=10)``."""

from vision.nets.families import (
    AS_IT_IS,
    FAMILIES,
    build_net,
    check_net,
    family_of,
    image_of,
    is_class_path,
    net_options,
    outline,
)
from vision.nets.network import Network, write_weights_
from vision.nets.reference import load_reference_state_dict, own_state_dict

__all__ = [
    "AS_IT_IS",
    "FAMILIES",
    "Network",
    "build_net",
    "check_net",
    "family_of",
    "image_of",
    "is_class_path",
    "load_reference_state_dict",
    "net_options",
    "outline",
    "own_state_dict",
    "write_weights_",
]
