"""The documentation site: Sphinx, MyST Markdown and furo. `make docs` builds it, and any warning fails the build."""

import inspect
import re
from importlib import metadata

import latex2mathml.converter
from docutils import nodes
from sphinx.util import logging

import tpaw_jax

project = "tpaw_jax"
author = "the tpaw_jax authors"
release = metadata.version("tpaw_jax")
html_title = f"tpaw_jax {release}"
html_theme = "furo"
html_copy_source = False

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
default_role = "code"
exclude_patterns = ["_build", "examples"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 88
html_math_renderer = "mathml"  # browsers render it themselves: no script, and it works offline
copybutton_prompt_text = r"\$ |>>> "
copybutton_prompt_is_regexp = True

_log = logging.getLogger(__name__)


def _require_docstring(app, what, name, obj, options, lines):
    """Warn of a public name without a docstring."""
    if what in ("function", "class", "method") and not any(line.strip() for line in lines):
        _log.warning("%s has no docstring", name)


def _require_all_public_names(app, env):
    """Warn of a name that `tpaw_jax` exports and the API page leaves out."""
    documented = {name.rpartition(".")[2] for name in env.domains["py"].objects}  # of earlier builds too
    for name in set(tpaw_jax.__all__) - documented:
        if inspect.isroutine(getattr(tpaw_jax, name)) or inspect.isclass(getattr(tpaw_jax, name)):
            _log.warning("tpaw_jax.%s is public and is not on the API page", name)


def _math(translator, node):
    display = "inline" if isinstance(node, nodes.math) else "block"
    translator.body.append(latex2mathml.converter.convert(node.astext(), display=display))
    raise nodes.SkipNode


def _shorten_types(app, what, name, obj, options, signature, returns):
    """Write Array for JAX's private class."""
    shorten = lambda text: text and re.sub(r"~?(jax\.)?jaxlib\._jax\.Array|jax\.Array", "Array", text)
    return shorten(signature), shorten(returns)


def setup(app):
    app.connect("autodoc-process-signature", _shorten_types)
    app.add_html_math_renderer("mathml", (_math, None), (_math, None))
    app.connect("autodoc-process-docstring", _require_docstring)
    app.connect("env-check-consistency", _require_all_public_names)
