"""Sphinx: the documents as a site that needs no network to be built or read (`make docs`)."""

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
