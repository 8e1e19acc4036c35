"""Sphinx configuration: `python -m sphinx -W --keep-going -b html docs docs/_build/html`."""

import html
import re
import sys
from pathlib import Path

import ziamath
from docutils import nodes
from sphinx import addnodes
from sphinx.transforms.post_transforms import SphinxPostTransform

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # document this checkout

import pixdistill
import pixdistill.functional

release = pixdistill.__version__
NAMES = {
    name: f"{module.__name__}.{name}"
    for module in (pixdistill, pixdistill.functional)
    for name, value in vars(module).items()
    if callable(value) and name[0] != "_"
}

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

# Formulas become SVG pictures when the pages are built: they need no network, no script and no font.
html_math_renderer = "svg"

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_title = f"pixdistill {release}"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def formula(tex, inline):
    """An SVG picture of a formula, as large as the text around it and in its colour."""
    size = 20  # units of the picture that are 1.1 em
    svg = ziamath.Latex(tex, size=size, color="currentColor", inline=inline).svg()
    left, top, width, height = map(float, re.findall(r'viewBox="([^"]*)"', svg)[0].split())
    em = [f"{1.1 * units / size:.3f}em" for units in (width, height, -(top + height))]
    style = f"width:{em[0]};height:{em[1]};vertical-align:{em[2]}"
    label = html.escape(" ".join(tex.split()), quote=True)
    view = f'viewBox="{left} {top} {width} {height}"'
    head = f'<svg role="img" aria-label="{label}" style="{style}" {view}>'
    return head + svg.partition(">")[2]


def visit_math(self, node):
    self.body.append(f'<span class="math">{formula(node.astext(), True)}</span>')
    raise nodes.SkipNode


def visit_math_block(self, node):
    self.body.append(f'<div class="math">{formula(node.astext(), False)}</div>')
    raise nodes.SkipNode


class LinkNames(SphinxPostTransform):
    """Public names in code font lead to their API pages."""

    default_priority = 5  # before references are resolved

    def run(self):
        for node in list(self.document.findall(nodes.literal)):
            name = NAMES.get(node.astext())
            taken = isinstance(node.parent, (nodes.title, nodes.reference, addnodes.pending_xref))
            if name is None or taken or self.env.docname.endswith(name):
                continue
            link = addnodes.pending_xref(
                "", refdomain="py", reftype="obj", reftarget=name, refdoc=self.env.docname
            )
            node.replace_self(link)
            link += node


def setup(app):
    app.add_post_transform(LinkNames)
    app.add_html_math_renderer("svg", (visit_math, None), (visit_math_block, None))
