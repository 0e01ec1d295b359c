"""Settings of the documentation site, for `make docs`."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "extensions")]

from mopcompress import __version__  # noqa: E402 (the path comes first)

project = "mopcompress"
author = "the mopcompress contributors"
copyright = "the mopcompress contributors, Apache-2.0"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "generated_pages",
    "mathml",
]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "examples"]
html_math_renderer = "mathml"

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.strikethrough"]

default_role = "code"  # single backticks in docstrings are code, as in Markdown
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_admonition_for_examples = False

html_theme = "furo"
html_title = "mopcompress"
html_static_path = ["static"]
html_css_files = ["site.css"]
smartquotes = False
toc_object_entries = False
html_copy_source = False
html_show_sourcelink = False
pygments_style = "friendly"
pygments_dark_style = "github-dark"
html_theme_options = {
    "navigation_with_keys": True,
    "light_css_variables": {"color-brand-primary": "#1d5fae", "color-brand-content": "#1d5fae"},
    "dark_css_variables": {"color-brand-primary": "#7cb4f2", "color-brand-content": "#7cb4f2"},
}
