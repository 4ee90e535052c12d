"Experts merged into one network: weights by hand, and the dense model of which they are copies."
import pytest, torch, transformers
from native_models import body, case, close, ids, make, own_layers, padded
from transformers import AutoConfig, AutoModelForCausalLM
from likeness import same_logits
from libmoe_nb.analysis.tracing import moe_layers, record_routing
from libmoe_nb.models.export import to_native
from libmoe_nb.models.merging import to_dense
from libmoe_nb.models.upcycling import upcycle
from libmoe_nb.moe.config import recipes

transformers.logging.set_verbosity_error(); transformers.logging.disable_progress_bar()

def naive_shares(m, inputs):
    "Share of real tokens that each expert got, counted one by one"
    with record_routing(m) as records: m(**inputs)
    real, out = inputs['attention_mask'].flatten().bool(), {}
    for n, (r,) in records.items():
        counts = [sum(int(e in row) for row, keep in zip(r.top_k_index.tolist(), real) if keep)
                  for e in range(r.num_experts)]
        out[n] = torch.tensor(counts) / sum(counts)
    return out

@pytest.mark.parametrize('recipe', ['smoe', 'sharede_v2', 'xmoe'])
def test_to_dense_weighs_by_load(recipe):
    m = make('llama', recipe, num_shared_experts=int(recipe == 'sharede_v2'))
    for by, shares in dict(mean={n: torch.full((l.experts.num_experts,), 1 / l.experts.num_experts)
                                 for n, l in moe_layers(m).items()}, load=naive_shares(m, padded())).items():
        d = to_dense(m, by, [padded()])
        for n, l in moe_layers(m).items():
            f, s, d_e = d.get_submodule(n), shares[n], 16
            n_s = l.shared_experts.intermediate_size if l.shared_experts is not None else 0
            gate, up = f.gate_up_proj.weight.chunk(2)
            torch.testing.assert_close(gate[n_s:], sum(p * w[:d_e] for p, w in zip(s, l.experts.gate_up_proj)),
                                       atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(up[n_s:], sum(p * w[d_e:] for p, w in zip(s, l.experts.gate_up_proj)),
                                       atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(f.down_proj.weight[:, n_s:], sum(p * w for p, w in zip(s, l.experts.down_proj)),
                                       atol=1e-5, rtol=1e-4)
            if n_s:
                assert (torch.equal(f.down_proj.weight[:, :n_s], l.shared_experts.down_proj.weight)
                        and torch.equal(gate[:n_s], l.shared_experts.gate_up_proj.weight.chunk(2)[0]))

@pytest.mark.parametrize('recipe', [r for r in recipes if r not in ('dense', 'tcmoe', 'moe_plus_plus')])
@pytest.mark.parametrize('b', ['llama', 'gpt2'])
def test_upcycled_copies_merge_into_the_dense_model(recipe, b, tmp_path):
    dense = AutoModelForCausalLM.from_config(body('llama') if b == 'llama'
                                             else AutoConfig.for_model('gpt2', vocab_size=96, n_embd=32, n_head=4,
                                                                       n_layer=2, n_inner=48)).eval()
    moe = upcycle(dense, recipe, 4, 2 + ('sharede' in recipe), num_shared_experts=int('sharede' in recipe), seed=0)
    for by, data in dict(mean=None, load=[ids()]).items():
        d = to_dense(moe, by, data)
        assert close(d(ids()).logits, dense(ids()).logits)
    if b == 'llama': assert close(to_native(d)(ids()).logits, dense(ids()).logits) and type(to_native(d)) is type(dense)
    d.save_pretrained(tmp_path)
    assert same_logits(AutoModelForCausalLM.from_pretrained(tmp_path)(ids()).logits, d(ids()).logits)

def test_to_dense_of_some_layers_and_in_half_precision():
    dense = AutoModelForCausalLM.from_config(body('llama', tie_word_embeddings=True)).eval()
    moe = upcycle(dense, 'smoe', 4, 2, layers=[1], seed=0)
    d = to_dense(moe)
    assert (d.config.layers == [1] and close(d(ids()).logits, dense(ids()).logits)
            and d.get_output_embeddings().weight is d.get_input_embeddings().weight)
    assert to_dense(moe.to(torch.bfloat16)).dtype == torch.bfloat16

def test_loads_do_not_change_the_model():
    m = case('mixtral').train()
    before = {n: p.clone() for n, p in m.state_dict().items()}
    to_dense(m, 'load', [ids(), padded()])
    assert m.training and all(torch.equal(p, before[n]) for n, p in m.state_dict().items())
    with pytest.raises(ValueError, match='at least one token, got none'): to_dense(m, 'load', [])

def test_a_part_that_is_in_another_mode_stays_so():
    m = case('mixtral').train()
    own_layers(m)[0].eval()
    modes = [x.training for x in m.modules()]
    to_dense(m, 'load', [ids()])
    assert [x.training for x in m.modules()] == modes
