"""How Sphinx makes the site of these pages: ``make docs`` writes it to build/docs."""
import inspect
import os
import pathlib
import re
import shutil
import sys

import mmdr
from docutils import nodes
from sphinx.util.docutils import SphinxDirective

os.environ["PATH"] = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # the tpllm whose help the pages show
os.environ["COLUMNS"] = "88"

HERE = pathlib.Path(__file__).parent
shutil.copytree(HERE.parent / "notebooks", HERE / "notebooks", dirs_exist_ok=True)  # Sphinx shows only what lies below this folder

project = "tpllm"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton", "sphinxcontrib.programoutput"]
exclude_patterns = ["**.ipynb_checkpoints"]
html_theme = "furo"
html_title = "tpllm"
html_static_path: list[str] = []

nb_execution_mode = "off"  # the outputs that are committed are shown
myst_heading_anchors = 3
myst_fence_as_directive = ["mermaid"]  # the fence that GitHub draws too
copybutton_prompt_text = "$ "
copybutton_only_copy_prompt_lines = True

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_class_signature = "mixed"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Attributes", "params_style")]  # so that "a, b: text" may describe two
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100

# Names of other packages: the build reads no inventory over the network.
nitpick_ignore_regex = [("py:.*", r"(jax|jaxlib|numpy|np|flax|pandas|tokenizers|collections|typing|pathlib)(\..*)?"),
                        ("py:class", r"tpllm\.(tokenizer\.folder\.TokenizerFolder|weights\.(policy\.Policy|scheme\.Array)|engine\.engine\.Engine)"),
                        ("py:.*", r"y|LARGEST|byte_codes|fragment_codes|pallas_kernels\.tiling\.Tiles")]  # what the site does not show


def _parsable(app, what, name, obj, options, signature, return_annotation):
    """A dataclass's signature without ``<factory>``, which is no Python."""
    return (signature or "").replace("<factory>", "...") or signature, return_annotation


class Mermaid(SphinxDirective):
    """A diagram in Mermaid's language, drawn when the page is built, so that the page shows it without scripts and without the network."""

    has_content = True

    def run(self):
        """The diagram as SVG, on white in dark pages, too; each has an id of its own, which its styles name."""
        drawn = mmdr.render("\n".join(["%%{init: {'theme': 'neutral'}}%%", *self.content])).svg()
        svg = drawn.replace("merman", f"diagram-{self.env.new_serialno('diagram')}").replace('style="', 'style="overflow:visible;', 1)
        return [nodes.raw("", f'<div style="background:white;padding:0.5rem 2rem;margin-bottom:1rem">{svg}</div>', format="html")]


def _within_the_site(app, docname, source):
    """Links between docs/ and notebooks/ as GitHub needs them, made into links from the site's root, below which both lie."""
    source[0] = re.sub(r"\]\((\.\./)+(docs/|(?=notebooks/))", "](/", source[0])


def setup(app):
    """Sphinx calls this."""
    from tpllm import LLM
    for function in (LLM.__init__, LLM.generate, LLM.chat):  # without other projects' names, which have a page of their own
        function.__signature__ = inspect.signature(function.__wrapped__)
    app.add_directive("mermaid", Mermaid)
    app.connect("source-read", _within_the_site)
    app.connect("autodoc-process-signature", _parsable)
