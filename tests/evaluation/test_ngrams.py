"Hashed tables against plain counts and plain search."
import math
from hypothesis import given, settings, strategies as st
from libmoe_nb.evaluation.ngrams import KnownText, NGram

@given(st.lists(st.sampled_from('abcdef'), min_size=1, max_size=60),
       st.lists(st.sampled_from('abcdef'), min_size=1, max_size=60), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_known_against_a_plain_search(train, words, longest):
    n = min(longest, len(words))
    run = lambda w: {tuple(w[i:i+n]) for i in range(len(w) - n + 1)}
    assert (' '.join(words) in KnownText([' '.join(train)], longest)) == bool(run(train) & run(words))

@given(st.lists(st.lists(st.sampled_from('abc'), max_size=12), min_size=1, max_size=4),
       st.lists(st.sampled_from('abcd'), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_ngram_against_plain_counts(docs, query):
    m = NGram([' '.join(d) for d in docs])
    stream = [0, 0] + [x for d in docs for x in [*d, 0, 0]]
    V = len(set(stream) - {0}) + 2
    def p(w, h):
        if not h: return (stream.count(w) + 1) / (len(stream) + V)
        runs = [tuple(stream[i:i+len(h)+1]) for i in range(len(stream) - len(h))]
        seen = [r[-1] for r in runs if r[:-1] == tuple(h)]
        if not seen: return p(w, h[1:])
        return (seen.count(w) + len(set(seen)) * p(w, h[1:])) / (len(seen) + len(set(seen)))
    history = [0, 0, *query[:-1]][-2:]
    assert math.isclose(math.exp(m.log_likelihood(m.history(' '.join(query[:-1])), query[-1])), p(query[-1], history),
                        rel_tol=1e-9)
