"""Networks by name: ``build_net("cifar_resnet110", method="fixup", num_classes=10)``."""

from vision.nets.families import FAMILIES, build_net, check_net, image_of, net_options
from vision.nets.methods import METHODS, Network, initialise_
from vision.nets.reference import load_reference_state_dict

__all__ = [
    "FAMILIES",
    "METHODS",
    "Network",
    "build_net",
    "check_net",
    "image_of",
    "initialise_",
    "load_reference_state_dict",
    "net_options",
]
