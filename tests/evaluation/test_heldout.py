"Held-out text: domains add up, and each module keeps its mode."
import pytest, torch
from libmoe_nb.data.text import text_data
from libmoe_nb.models.causal import from_scratch
from libmoe_nb.evaluation.heldout import evaluate_perplexity, routing_loads, text_perplexities

SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=16, moe_intermediate_size=8,
             vocab_size=300)

pytestmark = pytest.mark.filterwarnings('ignore::FutureWarning')

@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return text_data('python', vocab_size=300, sequence_length=32, max_bytes=100_000,
                     cache_dir=tmp_path_factory.mktemp('cache'))

def test_perplexity_by_domain_adds_up(tmp_path):
    for n in 'ab':
        (tmp_path/f'{n}.txt').write_text('\n\n'.join(f'{n} {i} ' + 'word ' * (i % 7 + 3) for i in range(2000)))
    two = text_data([str(tmp_path/'a.txt'), str(tmp_path/'b.txt')], vocab_size=280, sequence_length=32,
                    cache_dir=tmp_path/'cache', valid_fraction=.2)
    model = from_scratch('tcmoe', 'tiny', seed=0, **SMALL)
    res = evaluate_perplexity(model, two, batch_size=3, routing=True)
    total = sum(d['loss'] * d['tokens'] for d in res['domains'].values())
    assert (abs(total / res['tokens'] - res['loss']) < 1e-9
            and sum(d['tokens'] for d in res['domains'].values()) == res['tokens'])
    assert abs(evaluate_perplexity(model, two, batch_size=16)['loss'] - res['loss']) < 1e-5
    for (_, d), t in res['routing'].groupby(['layer', 'domain']):
        assert len(t) == 8 and t.share.sum() <= 1 + 1e-9 and abs(t['load'].mean() - 1) < 1e-6

MEASURES = dict(perplexity=lambda m, d: evaluate_perplexity(m, d, steps=1),
                loads=lambda m, d: routing_loads(m, d, steps=1),
                texts=lambda m, d: text_perplexities(m, d.tokenizer, dict(a='def f(x): return x')))

@pytest.mark.parametrize('measure', MEASURES)
def test_each_module_keeps_its_mode(measure, data):
    "Also a part that is frozen in evaluation mode while the model trains, and where the measure fails"
    model = from_scratch('smoe', 'tiny', seed=0, **SMALL)
    model.base.model.layers[0].eval()
    modes = lambda: {n: m.training for n, m in model.named_modules()}
    before, seen = modes(), []
    model.base.model.layers[1].register_forward_hook(lambda *a: seen.append(any(modes().values())))
    MEASURES[measure](model, data)
    assert modes() == before and seen and not any(seen)
    model.base.model.layers[1].register_forward_hook(lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError): MEASURES[measure](model, data)
    assert modes() == before

def test_perplexity_of_a_text_by_hand(data):
    model, text = from_scratch('smoe', 'tiny', seed=0, **SMALL), 'def f(x): return x'
    ids = data.tokenizer(text, return_tensors='pt').input_ids
    with torch.no_grad(): log_p = model.eval()(ids).logits.log_softmax(-1)[0, :-1]
    expected = (-log_p[torch.arange(ids.shape[1] - 1), ids[0, 1:]].mean()).exp().item()
    assert text_perplexities(model, data.tokenizer, dict(a=text))['a'] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="at least 2 tokens each, got 0 in 'b'"):
        text_perplexities(model, data.tokenizer, dict(a=text, b=''))
