"""Residual networks for images, with and without normalisation, in PyTorch Lightning."""
