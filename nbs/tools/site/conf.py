"Configuration of Sphinx for the site; `neuralsolver.tools.docs` copies it to the sources."

import json
from pathlib import Path

# project, title, copyright, and the names that prose links to the API reference
globals().update(json.loads(Path(__file__).with_name('settings.json').read_text()))

language = 'en'
extensions = ['myst_nb', 'sphinx.ext.mathjax', 'sphinx_copybutton', 'neuralsolver.tools.docs']
exclude_patterns = ['_extra', '_templates']
templates_path = ['_templates']
smartquotes = False
pygments_style = 'friendly'
pygments_dark_style = 'monokai'

# notebooks are shown as they are committed
nb_execution_mode = 'off'
nb_merge_streams = True
nb_code_prompt_show = nb_code_prompt_hide = 'Code'
nb_render_markdown_format = 'myst'
myst_enable_extensions = ['dollarmath', 'amsmath']
myst_dmath_double_inline = True
myst_heading_anchors = 4

# one local file of MathJax; its menu would fetch more from the network
mathjax_path = 'tex-svg-full.js'
myst_update_mathjax = False
mathjax3_config = {
    'svg': {'fontCache': 'local'},
    # errors are to be seen
    'tex': {'packages': {'[-]': ['noundefined', 'noerrors']}},
    'options': {
        'enableMenu': False,
        'processHtmlClass': 'math',
        'ignoreHtmlClass': 'article-container',
    },
}

html_theme = 'furo'
html_static_path = ['_static']
html_extra_path = ['_extra']
html_css_files = ['site.css']
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False

# results without a server have excerpts, answers to questions come first
html_search_scorer = str(Path(__file__).with_name('search.js'))
