"Coloured text says what the trace says, whatever is in it."
import html.parser
import numpy as np, pytest

from libmoe_nb.analysis.metrics import random_trace
from libmoe_nb.analysis.traces import make_trace
from libmoe_nb.plots.text import token_html

def long(seed, T=600): return random_trace(T, 66, 8, 1, seed=seed, token=np.arange(T) % 90)

class Reader(html.parser.HTMLParser):
    "Tokens of the text (title, style, text), and whether all tags are closed"
    def __init__(self): super().__init__(); self.open, self.tokens = [], []
    def handle_starttag(self, tag, attrs):
        self.open.append((tag, dict(attrs)))
        if 'title' in dict(attrs): self.tokens.append([dict(attrs)['title'], dict(attrs)['style'], ''])
    def handle_endtag(self, tag): assert self.open.pop()[0] == tag
    def handle_data(self, data):
        if any('title' in a for _, a in self.open): self.tokens[-1][2] += data

class Bytes:
    "A tokenizer of bytes"
    def decode(self, ids, **kw): return bytes(ids).decode(errors='replace')

def test_coloured_text_is_the_text():
    text = 'if a < b & "c": print(\'<script>alert(1)</script>\')  # naïve\n\treturn\n'
    ids = list(text.encode())
    t = random_trace(len(ids), 66, 8, 3, token=ids, domain=np.zeros(len(ids), int),
                     domains=['"><img src=x onerror=alert(1)>'])
    r = Reader()
    r.feed(token_html(t, Bytes(), layer=1))
    assert not r.open and len(r.tokens) == len(ids)
    assert ''.join(x for _, _, x in r.tokens).replace('·', '').replace('↵', '') == text
    l = t.layer(1)
    for i, (title, _, _) in enumerate(r.tokens):
        said = [int(p.split(':')[0].split()[-1]) for p in title.split('. ', 1)[1].split(', ')]
        assert said == l.expert[i].tolist()

def test_an_expert_keeps_its_look():
    a, b = (Reader() for _ in range(2))
    t, u = long(0), long(1)
    a.feed(token_html(t, num_tokens=600)); b.feed(token_html(u, num_tokens=600))
    looks = {}
    for r, trace in ((a, t), (b, u)):
        for (_, style, _), e in zip(r.tokens, trace.layer(0).expert[:, 0]):
            assert looks.setdefault(int(e), style) == style
    assert len(set(looks.values())) == len(looks) == 66

def test_choices_without_an_expert():
    t = make_trace([[[2, 0], [0, 3], [4, 5]]], 2, 2, expert_of=[0, 1, 0, 1, 2, 2], sign_of=[1, 1, -1, -1, 1, 1])
    text = token_html(t, numbers=True)
    assert 'expert −0' in text and 'none: 0.50, none: 0.50' in text and '>–</sub>' in text

@pytest.mark.parametrize('N, K', [(1, 1), (2, 1), (200, 3)])
def test_odd_sizes_of_text(N, K):
    t = random_trace(50, N, K, 2, domain=np.zeros(50, int), domains=['all of it'])
    assert token_html(t).count('<span title=') == 50
