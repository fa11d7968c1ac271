"""Sphinx: the documents as a site that needs no network to be built or read (`make docs`)."""

import builtins
from typing import Any

from sphinx.addnodes import pending_xref

project = "beatless"

html_theme = "furo"
html_title = "beatless"
html_copy_source = False
html_show_sphinx = False
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
myst_heading_anchors = 4
myst_enable_extensions = ["attrs_block"]
suppress_warnings = ["myst.header", "misc.highlighting_failure"]
default_role = "code"  # docstrings have single backticks, as Markdown
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 88
add_module_names = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def unlink_builtins(_app: Any, document: Any) -> None:
    """Sphinx takes `type` in a signature for an attribute of that name, as StepFailed.type."""
    for reference in list(document.findall(pending_xref)):
        if hasattr(builtins, reference["reftarget"]):
            reference.replace_self(reference.children)


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("doctree-read", unlink_builtins)
