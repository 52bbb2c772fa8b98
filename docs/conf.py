"""Settings of the book: ``make docs`` builds it with Sphinx, MyST and furo."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_ext")]

project = "Fixup"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "repository",
    "command_help",
    "registry",
]
exclude_patterns = ["_build", "gallery"]

myst_heading_anchors = 4
myst_enable_extensions = ["deflist"]

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# Every reference to our own names must be found. PyTorch's pages are not at hand at build time.
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r"(?!fixup_core|fixup_mt|vision).*")]

html_theme = "furo"
html_title = "Fixup"
html_static_path = ["_static"]
html_css_files = ["book.css"]
html_show_sphinx = False
html_show_copyright = False
copybutton_prompt_text = r">>> |\$ "
copybutton_prompt_is_regexp = True

# What the plugin reports at its import is for fairseq's commands.
logging.getLogger("fixup_mt").setLevel(logging.WARNING)

linkcheck_timeout = 20
linkcheck_anchors = False  # GitHub writes its anchors by script

# The gallery's scripts are executed; a book without them builds as well.
if any((HERE / "gallery").glob("*.py")):
    extensions.append("sphinx_gallery.gen_gallery")
    sphinx_gallery_conf = {
        "examples_dirs": "gallery",
        "gallery_dirs": "auto_gallery",
        "filename_pattern": r"\.py$",
        "abort_on_example_error": True,
        "capture_repr": (),
        "show_memory": False,
        "download_all_examples": False,
    }
else:
    exclude_patterns.append("auto_gallery")
