"""Sphinx configuration: `python -m sphinx -W --keep-going -b html docs docs/_build/html`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # document this checkout

from pixdistill import __version__ as release

project = "pixdistill"
author = "The pixdistill authors"
copyright = author
version = release

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "examples"]
templates_path = ["_templates"]

myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3

default_role = "code"  # docstrings mark code with single backticks
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
add_module_names = False
toc_object_entries_show_parents = "hide"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
python_maximum_signature_line_length = 88

# Where torch's site cannot be reached, torch.inv stands in for its inventory. It holds the names that
# these pages link to. To regenerate it from the site's objects.inv (`raw`), NAMES being those names:
#     head, end, body = raw.partition(b"using zlib.\n")
#     kept = [x for x in zlib.decompress(body).splitlines(True) if x.split()[0].decode() in NAMES]
#     Path("docs/torch.inv").write_bytes(head + end + zlib.compress(b"".join(kept)))
intersphinx_mapping = {"torch": ("https://docs.pytorch.org/docs/stable/", (None, "torch.inv"))}
intersphinx_timeout = 10

# A formula that is wider than a phone continues on the next line.
mathjax4_config = {"output": {"displayOverflow": "linebreak"}}

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_title = f"pixdistill {release}"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
