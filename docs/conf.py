"""How Sphinx makes the site of these pages: ``make docs`` writes it to build/docs."""
import inspect
import os
import pathlib
import sys

os.environ["PATH"] = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # the tpllm whose help the pages show
os.environ["COLUMNS"] = "100"

project = "tpllm"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton", "sphinxcontrib.mermaid",
              "sphinxcontrib.programoutput"]
html_theme = "furo"
html_title = "tpllm"
html_static_path: list[str] = []

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


def setup(app):
    """Sphinx calls this."""
    from tpllm import LLM
    for function in (LLM.__init__, LLM.generate, LLM.chat):  # without other projects' names, which have a page of their own
        function.__signature__ = inspect.signature(function.__wrapped__)
    app.connect("autodoc-process-signature", _parsable)
