"A tokenizer whose largest id has no row in the embedding is refused in one sentence; one with gaps in its ids is not."
import json, random
import numpy as np, pytest
from tokenizers import Tokenizer, models as tokenizer_models, pre_tokenizers, decoders
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner
from libmoe_nb.cli import app
from libmoe_nb.data.text import check_ids, largest_id, text_data
from libmoe_nb.models.causal import from_scratch
from libmoe_nb.evaluation.suites import Suite, make_suite
from libmoe_nb.training.learner import moe_learner
from libmoe_nb.evaluation.heldout import text_perplexities
from libmoe_nb.experiments.upcycle import upcycle_and_train

def tokenizer(at=None, special=()):
    "257 pieces: bytes, the letter e at id `at` where that is given, and the end of text"
    vocab = {c: i for i,c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))} | {'<|endoftext|>': 256}
    if at: vocab['e'] = at
    tok = Tokenizer(tokenizer_models.BPE(vocab, []))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token='<|endoftext|>',
                                   additional_special_tokens=[*special])

GAP, FAR = 400, 70_000

@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch): monkeypatch.setenv('LIBMOE_CACHE', str(tmp_path/'cache'))
@pytest.fixture
def words(tmp_path):
    "A folder of two domains, 25 kB each"
    r = random.Random(0)
    sentence = lambda: ' '.join(r.choices('the house river stone was walked under over a tree number of and winter '
                                          'king garden quiet'.split(), k=12)).capitalize() + '.'
    for d in ('tales', 'notes'):
        (tmp_path/'texts'/d).mkdir(parents=True)
        for i in range(40):
            (tmp_path/'texts'/d/f'{i}.txt').write_text(' '.join(sentence() for _ in range(9)), encoding='utf-8')
    return tmp_path/'texts'

SMALL = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
             max_position_embeddings=128, bos_token_id=None, eos_token_id=256)
def dense(rows): return LlamaForCausalLM(LlamaConfig(vocab_size=rows, **SMALL))
def mixture(rows): return MixtralForCausalLM(MixtralConfig(vocab_size=rows, num_local_experts=4, **SMALL))
def keep(model, tok, path): model.save_pretrained(path); tok.save_pretrained(path); return path
def command(*args): return CliRunner().invoke(app, [str(a) for a in args])
def refused(res, at, rows):
    assert res.exit_code == 2 and isinstance(res.exception, (SystemExit, type(None))), res.exception
    last = res.stderr.strip().splitlines()[-1]
    assert last.startswith('libmoe: ') and f'gives token {at}' in last and f'knows {rows} tokens' in last, last

# --- the number itself
def test_largest_id():
    assert [largest_id(tokenizer(at)) for at in (None, GAP, FAR)] == [256, GAP, FAR]
    padded = tokenizer(None, special=['<image>'])
    padded.add_special_tokens(dict(pad_token='<pad>'))
    assert len(padded) == 259 and largest_id(padded) == 256                    # text never turns into these
    padded.add_tokens(['<word>']); assert largest_id(padded) == 259

def test_the_embedding_counts_not_the_configuration():
    m = dense(300); m.resize_token_embeddings(500)
    check_ids(tokenizer(GAP), m)
    m.config.vocab_size = 10_000
    with pytest.raises(ValueError, match='gives token 70000, but the model knows 500 tokens'):
        check_ids(tokenizer(FAR), m)
    check_ids(tokenizer(FAR), dense(300).config.__class__(vocab_size=FAR+1))

# --- packing
@pytest.mark.parametrize('at, dtype', [(GAP, 'uint16'), (65_535, 'uint16'), (65_536, 'uint32'), (FAR, 'uint32')])
def test_packed_tokens_hold_every_id(at, dtype, words):
    tok = tokenizer(at)
    data = text_data(str(words), tokenizer=tok, sequence_length=32)
    assert data.vocab_size == at + 1 and str(data.train.dtype) == dtype
    s = np.asarray(data.valid.tokens).astype(np.int64)
    assert s.max() == at and 'number' in tok.decode(s.tolist()) and 'river' in tok.decode(s.tolist())
    assert data.unigram_perplexity() < at and len(data.unigram_perplexity(by_domain=True)) == 2

def test_small_tokenizers_are_taken(words):
    "A tokenizer that is given needs no 257 pieces"
    alphabet = sorted(set(' '.join(p.read_text() for p in words.rglob('*.txt'))))
    tok = Tokenizer(tokenizer_models.BPE({c: i for i,c in enumerate(sorted(pre_tokenizers.ByteLevel(
        add_prefix_space=False).pre_tokenize_str(c)[0][0] for c in alphabet))} | {'<e>': 90}, []))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert text_data(str(words), tokenizer=PreTrainedTokenizerFast(tokenizer_object=tok, eos_token='<e>'),
                     sequence_length=16).vocab_size == 91

# --- training, upcycling, evaluation, analysis
@pytest.mark.parametrize('at, rows', [(GAP, 300), (FAR, 300)])
def test_training(at, rows, words):
    data = text_data(str(words), tokenizer=tokenizer(at), sequence_length=32)
    with pytest.raises(ValueError, match=f'gives token {at}, but the model knows {rows} tokens'):
        moe_learner(dense(rows), data, preset='tiny', steps=1)
    learn = moe_learner(dense(at+1), data, preset='tiny', steps=1, batch_size=2)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert np.isfinite(learn.recorder.values[-1][0])

def test_training_a_mixture_from_scratch_on_gaps(words):
    data = text_data(str(words), tokenizer=tokenizer(GAP), sequence_length=32)
    learn = moe_learner(from_scratch('smoe', 'tiny', vocab_size=data.vocab_size, sequence_length=32, seed=0), data,
                        preset='tiny', steps=1, batch_size=2)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)

def test_upcycling(words, tmp_path):
    box = keep(dense(300), tokenizer(GAP), tmp_path/'small')
    refused(command('upcycle', box, '--data', words, '--steps', 1, '--out', tmp_path/'out'), GAP, 300)
    good = keep(dense(GAP+1), tokenizer(GAP), tmp_path/'good')
    res = upcycle_and_train(str(good), data=str(words), steps=1, sequence_length=32, dense=False, threads=1)
    assert np.isfinite(res.select_dtypes('number').to_numpy(float)).any()
    # a special token without a row, as published
    extra = keep(dense(257), tokenizer(None, special=['<image>']), tmp_path/'image')
    upcycle_and_train(str(extra), data=str(words), steps=1, sequence_length=32, dense=False, threads=1)
    with pytest.raises(ValueError, match='gives token 400'):
        text_perplexities(dense(300), tokenizer(GAP), dict(a='here'))

def test_evaluating(words, tmp_path):
    box = keep(mixture(300), tokenizer(GAP), tmp_path/'small')
    refused(command('evaluate', box, '--data', words, '--examples', 2), GAP, 300)
    good = keep(mixture(GAP+1), tokenizer(GAP), tmp_path/'good')
    assert json.loads(command('evaluate', good, '--data', words, '--examples', 2, '--json').stdout)['results']

def test_analyzing(words, tmp_path):
    box = keep(mixture(300), tokenizer(GAP), tmp_path/'small')
    refused(command('analyze', box, '--data', words, '--tokens', 200, '--no-perturb', '--out', tmp_path/'out'), GAP,
            300)
    good = keep(mixture(GAP+1), tokenizer(GAP), tmp_path/'good')
    res = command('analyze', good, '--data', words, '--tokens', 200, '--no-perturb', '--out', tmp_path/'out')
    assert res.exit_code == 0, res.stderr

# --- tasks made from a small text
@pytest.mark.parametrize('options', [[], ['--text-field', 'body', '--domain-field', 'meta.kind']])
def test_evaluate_asks_of_a_small_text(options, words, tmp_path):
    "Too small for thousands of pieces, and one that no tokenizer has to spell"
    box = keep(mixture(257), tokenizer(None), tmp_path/'model')
    src = words
    if options:
        src = tmp_path/'a.jsonl'
        src.write_text(''.join(json.dumps(dict(body=p.read_text(), meta=dict(kind=p.parent.name))) + '\n'
                               for p in sorted(words.rglob('*.txt'))))
        res = command('evaluate', box, '--data', src, '--examples', 2)
        assert res.exit_code == 2 and "no field text_field='text': found 'body', 'meta'" in res.stderr.splitlines()[-1]
    res = command('evaluate', box, '--data', src, '--examples', 2, '--json', *options)
    assert res.exit_code == 0, res.stderr
    tasks = {r['task'] for r in json.loads(res.stdout)['results']}
    assert {t.rsplit('_', 1)[1] for t in tasks} == {'tales', 'notes'}

def test_questions_do_not_depend_on_the_model(words, tmp_path):
    "One that spells all in lower case is asked what any other is, and the suite is that of `compare`"
    from tokenizers import normalizers
    low = tokenizer(None)
    low.backend_tokenizer.normalizer = normalizers.Lowercase()
    for p in words.rglob('*.txt'): p.write_text(p.read_text().replace('king', 'King'))
    prints = []
    for i,tok in enumerate([tokenizer(None), low]):
        out = tmp_path/f'out{i}'
        assert command('evaluate', keep(mixture(257), tok, tmp_path/f'm{i}'), '--data', words, '--examples', 2, '--out',
                       out).exit_code == 0
        prints.append(json.loads((out/'results.json').read_text())['info']['suites'])
    assert prints[0] == prints[1] == [make_suite(text_data(str(words), vocab_size=300, sequence_length=32),
                                                 num_examples=2).fingerprint]

def test_max_bytes_of_evaluate(words, tmp_path):
    box = keep(mixture(257), tokenizer(None), tmp_path/'model')
    res = command('evaluate', box, '--data', words, '--examples', 2, '--max-bytes', 10)
    assert res.exit_code == 2 and 'data' in res.stderr.splitlines()[-1]
    res = command('evaluate', box, '--data', words, '--examples', 2, '--max-bytes', -1)
    assert res.exit_code == 2 and '--max-bytes must be at least 0, got -1' in res.stderr.splitlines()[-1]
    assert command('evaluate', box, '--data', words, '--examples', 2, '--max-bytes', 0).exit_code == 0

def test_a_suite_that_is_no_suite(tmp_path):
    (tmp_path/'s').write_text('['*100_000)
    with pytest.raises(ValueError, match='damaged or no suite'): Suite.load(tmp_path/'s')

# --- held out is what a run held out
def test_text_that_changed_is_not_held_out(words):
    from libmoe_nb.experiments.probe import same_documents
    data = text_data(str(words), vocab_size=300, sequence_length=32)
    parts = json.loads(json.dumps(data.info))
    shorter = text_data(str(words), tokenizer=data.tokenizer, sequence_length=16)
    assert same_documents(data, parts) and same_documents(shorter, parts) and same_documents(data, None)
    for p in (words/'notes').glob('3*.txt'): p.unlink()
    assert not same_documents(text_data(str(words), tokenizer=data.tokenizer, sequence_length=32), parts)

def test_an_analysis_of_a_run_whose_text_changed(words, tmp_path):
    args = ['--preset', 'tiny', '--steps', 2, '--batch-size', 2, '--sequence-length', 32, '--vocab-size', 300,
            '--threads', 1, '--traces', 0]
    res = command('train', 'smoe', '--data', words, '--out', tmp_path/'run', *args)
    assert res.exit_code == 0, res.stderr
    look = lambda: json.loads(command('analyze', tmp_path/'run', '--tokens', 300, '--no-perturb', '--json', '--out',
                                      tmp_path/'a').stdout)
    assert look()['held_out']
    for p in (words/'notes').glob('3*.txt'): p.unlink()
    assert not look()['held_out']
