"""Networks by name: ``build_net("cifar_resnet110", method="fixup", num_classes=10)``."""

from vision.nets.families import FAMILIES, build_net, check_net, image_of, net_options
from vision.nets.network import Network, write_weights_
from vision.nets.reference import load_reference_state_dict

__all__ = [
    "FAMILIES",
    "Network",
    "build_net",
    "check_net",
    "image_of",
    "load_reference_state_dict",
    "net_options",
    "write_weights_",
]
