"What you see in Jupyter: under a kernel, figures are shown by the backend that the first of them chooses."
import os
from pathlib import Path

import nbformat, pytest
from nbclient import NotebookClient

NBS = Path(__file__).resolve().parents[1]/'nbs'

def run(nb, cwd, settings):
    "`nb` after a kernel of Jupyter ran it in a folder, with Jupyter's backend; `settings`: IPython's folder"
    env = {k: v for k, v in os.environ.items() if k != 'MPLBACKEND'}
    env['IPYTHONDIR'] = str(settings)
    client = NotebookClient(nb, timeout=300, kernel_name='python3', resources=dict(metadata=dict(path=str(cwd))))
    return client.execute(env=env)

def figures(cell): return sum('image/png' in o.get('data', {}) for o in cell.get('outputs', []))

def test_every_figure_of_a_session_is_shown(tmp_path):
    cells = ["import pandas as pd\nfrom libmoe_nb.plots.training import plot_curves, plot_perplexity\n"
             "from libmoe_nb.plots.style import panels\n"
             "df = pd.DataFrame(dict(recipe='smoe', seed=0, tokens=[1, 2], valid_perplexity=[3., 2.]))",
             "plot_curves(df);", "ax = plot_curves(df)", "plot_curves(df, ax=panels(1));",
             "import matplotlib.pyplot as plt\nplt.plot([1, 2]);"]
    nb = run(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells]), tmp_path, tmp_path)
    assert [figures(c) for c in nb.cells] == [0, 1, 1, 1, 1]

def stored(path): return nbformat.read(path, as_version=4)

# a page with many figures that trains nothing, so that it is drawn in seconds
PAGES = 'plots/training.ipynb',

@pytest.mark.long
@pytest.mark.parametrize('path', [NBS/p for p in PAGES], ids=lambda p: p.stem)
def test_a_page_shows_in_jupyter_the_figures_that_it_stores(path, tmp_path):
    before = stored(path)
    after = run(stored(path), path.parent, tmp_path)
    assert sum(map(figures, before.cells)) > 2
    assert [(c.id, figures(c)) for c in after.cells
            if c.cell_type == 'code'] == [(c.id, figures(c)) for c in before.cells if c.cell_type == 'code']
