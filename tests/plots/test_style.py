"What figures share: settings that stay inside, looks, and figures that leave the notebook."
import io

import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt
import pytest

from libmoe_nb.plots.style import (close_figure, colour_contrast, colour_distance, figure_style, figure_uri, in_style,
                                   make_axes, panels, recipe_looks, recipe_style, recipe_title)

@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close('all')

def test_a_failure_inside_leaves_the_settings_as_they_were():
    before = {k: plt.rcParams[k] for k in figure_style}
    with pytest.raises(KeyboardInterrupt), in_style(**{'font.size': 30}): raise KeyboardInterrupt
    assert {k: plt.rcParams[k] for k in figure_style} == before

def test_a_closed_figure_is_forgotten_and_can_still_be_written():
    fig = panels(1).figure
    assert close_figure(fig) is fig and plt.get_fignums() == []
    fig.savefig(out := io.BytesIO())
    assert out.getvalue()
    assert figure_uri(fig).startswith('data:image/svg+xml;base64,')

def test_a_look_of_ones_own(monkeypatch):
    monkeypatch.setitem(recipe_looks, 'mine', ('#123456', ':', 'x'))
    assert recipe_style('mine') == dict(color='#123456', linestyle=':', marker='x')
    assert (recipe_title('mine'), recipe_title('smoe')) == ('mine', 'SMoE')

def test_axes_that_were_given_are_taken():
    ax = panels(1)
    assert make_axes(ax, 1, 1) is ax and make_axes(None, 2, 1).figure.get_size_inches().tolist() == [2, 1]

def test_colours():
    assert colour_contrast('white', 'black') == colour_contrast('black', 'white') == pytest.approx(21)
    assert colour_distance(['#ff0000', '#ff0000'], 'usual')[0] == 0
    d, a, b = colour_distance(['#000000', '#ffffff', '#010101'], 'tritanopia')
    assert {a, b} == {'#000000', '#010101'} and d < 2
