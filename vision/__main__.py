"""Command line: ``python -m vision fit --config recipes/vision/....yaml``."""

from __future__ import annotations

from vision.cli import VisionCLI


def main() -> None:
    """Run the command line."""
    VisionCLI()


if __name__ == "__main__":
    main()
