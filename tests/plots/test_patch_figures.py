"Maps of experts: the right colour in the right place, readable at real sizes, and errors that say what is wrong."
import numpy as np, pytest
import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt
from dataclasses import replace
from matplotlib.colors import to_rgb
from PIL import Image

from libmoe_nb.analysis.metrics import random_trace
from libmoe_nb.analysis.patches import expert_maps, patch_information
from libmoe_nb.analysis.traces import make_trace
from libmoe_nb.plots.patches import *


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close('all')

def placed(t, images, side, scales=(1,)):
    "A trace of so many tokens with places"
    rows = [(i, s, c, r, q) for i in range(images) for s in scales for c in range(s * s) for r in range(side)
            for q in range(side)]
    return replace(t, columns=dict(zip(('image', 'scale', 'crop', 'row', 'column'), np.array(rows).T)))

def big(N=66, K=8, L=3, images=14, side=16):
    return placed(random_trace(images * side * side, N, K, L), images, side)


def test_each_patch_has_the_colour_and_the_number_of_its_expert():
    choice = np.arange(4 * 2)[:, None] % 5
    t = placed(make_trace(np.concatenate([choice, (choice + 1) % 5], 1)[None], 5, 1), 2, 2)
    fig = plot_expert_maps(t, images=[1], strength=None, pictures=[np.full((8, 8, 3), 255, np.uint8)] * 2)
    ax = fig.axes[1]
    im = ax.images[-1].get_array()
    want = expert_maps(t, 0)[1].astype(int)
    assert want.tolist() == [[4, 0], [1, 2]]
    for (r, q), e in np.ndenumerate(want):
        assert np.allclose(im[r, q, :3], to_rgb(expert_colour(e, 5))) and im[r, q, 3] > .9
    assert {(x.get_text(), *map(int, x.get_position()[::-1])) for x in ax.texts} == {
        (str(e), r, q) for (r, q), e in np.ndenumerate(want)}
    assert [x.get_text() for x in fig.legends[0].get_texts()] == [f'expert {e}' for e in (0, 1, 2, 4)]


def test_what_runs_no_expert_is_grey():
    t = make_trace(np.array([[[0, 1], [3, 0], [2, 0], [1, 0]]]), 2, 1, expert_of=np.array([0, 1, 2, 2]))
    t = placed(t, 1, 2)
    fig = plot_expert_maps(t)
    assert 'no expert' in [x.get_text() for x in fig.legends[0].get_texts()]
    assert np.allclose(fig.axes[0].images[-1].get_array()[0, 1, :3], to_rgb(expert_colour(2, 2)))
    assert '–' in [x.get_text() for x in fig.axes[0].texts]


def test_strength_is_the_weight_of_the_first_expert():
    w = np.array([[[.5, .5], [.9, .1], [1, 0], [.6, .4]]])
    t = placed(make_trace(np.array([[[0, 1]] * 4]), 3, 2, weight=w), 1, 2)
    for strength in ('weight', 'entropy'):
        a = plot_expert_maps(t, strength=strength).axes[0].images[-1].get_array()[..., 3].reshape(-1)
        assert a[2] > a[1] > a[3] > a[0]


FIGURES = dict(
    maps=lambda: plot_expert_maps(big()),
    recipes=lambda: plot_expert_maps(dict(smoe=big(6, 3), sharede_v2=big(5, 2), tcmoe=big(6, 3)), images=[0, 3]),
    fine=lambda: plot_expert_maps(placed(random_trace(2 * 10 * 36, 6, 3, 1), 2, 6, (1, 3)), scale=3),
    one=lambda: plot_expert_maps(big(8, 2, 1), images=0, layers=0),
    weight=lambda: plot_expert_weight(big(), 3),
    few=lambda: plot_expert_weight(big(), 3, images=[2], pictures=[np.zeros((9, 9, 3), np.uint8)] * 14),
    places=lambda: plot_expert_places(big(), 1),
    places_few=lambda: plot_expert_places(big(4, 1), 0),
    information=lambda: plot_information(patch_information(big(6, 2), folds=4, shuffles=2)).figure)

def overlap(a, b): return min(a.x1, b.x1) - max(a.x0, b.x0) > .5 and min(a.y1, b.y1) - max(a.y0, b.y0) > .5

@pytest.mark.parametrize('name', FIGURES)
def test_text_neither_overlaps_nor_is_cut(name):
    fig = FIGURES[name]()
    fig.canvas.draw()
    texts = [t for l in fig.legends for t in l.get_texts()]
    for ax in fig.axes:
        ticks = [t for axis in (ax.xaxis, ax.yaxis) for t in axis._update_ticks()]          # those in view
        texts += [*(l for t in ticks for l in (t.label1, t.label2) if l.get_visible()), ax.xaxis.label, ax.yaxis.label,
                  ax._left_title]
    boxes = [t.get_window_extent() for t in texts if t.get_text() and t.get_visible()]
    for i, a in enumerate(boxes):
        assert a.x0 >= -1 and a.y0 >= -1 and a.x1 <= fig.bbox.width + 1 and a.y1 <= fig.bbox.height + 1, name
        for b in boxes[i + 1:]: assert not overlap(a, b), name


def test_pictures_come_from_a_folder_and_no_further(tmp_path):
    (tmp_path/'in').mkdir()
    for f, colour in (('in/a.png', (255, 0, 0)), ('a.png', (0, 0, 255))):
        Image.new('RGB', (8, 8), colour).save(tmp_path/f)
    t = big(4, 2, 1, 1, 4)
    t.meta['info']['images'] = ['../a.png']                              # a hostile trace names a file outside
    assert picture_of(t, 0, tmp_path/'in')[0, 0].tolist() == [255, 0, 0]
    assert picture_of(t, 0, None) is None
    with pytest.raises(ValueError, match='image must be below 1, got 4'): picture_of(t, 4, tmp_path)


def test_errors_say_what_is_wrong():
    t = big(4, 2, 2, 2, 4)
    for f, message in [(lambda: plot_expert_maps(t, images=[2]), 'images must be between 0 and 1, got 2'),
                       (lambda: plot_expert_maps(t, layers=[2]), 'layers must be between 0 and 1'),
                       (lambda: plot_expert_maps(t, scale=3), r'scale must be one of the trace \(1\), got 3'),
                       (lambda: plot_expert_maps(t, strength='x'), 'strength must be'),
                       (lambda: plot_expert_maps(random_trace()), 'trace must be one of `trace_images`'),
                       (lambda: plot_expert_weight(t, 4), 'of must be between 0 and 3, got 4')]:
        with pytest.raises(ValueError, match=message): f()
