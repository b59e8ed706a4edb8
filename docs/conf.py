"""How the site is built: `make docs`."""

import ftdata

project = "ftdata"
author = "the ftdata developers"
version = release = ftdata.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["scripts"]
html_theme = "furo"
html_title = f"ftdata {version}"
html_copy_source = html_show_sourcelink = False
templates_path = []

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
# Blocks of the shell hold prompts and what is printed.
suppress_warnings = ["misc.highlighting_failure"]

# Docstrings are written as Markdown has it: single backticks are code.
default_role = "code"
autodoc_typehints = "signature"
maximum_signature_line_length = 88
autodoc_member_order = "bysource"
html_show_copyright = False
napoleon_use_rtype = False
# The site is built without the extra `train`.
autodoc_mock_imports = ["torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "safetensors"]
napoleon_use_ivar = True
napoleon_attr_annotations = False
python_use_unqualified_type_names = True
